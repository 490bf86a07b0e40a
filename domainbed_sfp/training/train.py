"""A run from its settings to its files."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from domainbed_sfp import networks
from domainbed_sfp.core import crashes, runtime
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.core.overrides import parse_overrides
from domainbed_sfp.runs import records
from domainbed_sfp.runs.layout import CHECKPOINT, DONE, ERR, FAILURE
from domainbed_sfp.runs.settings import RunSettings, check_settings
from domainbed_sfp.training.console import note, tee
from domainbed_sfp.training.folder import alone, refuse_other_run
from domainbed_sfp.training.hparams import checked_overrides, resolve_hparams
from domainbed_sfp.training.interruption import Interrupted, StopRequest, stop_signals
from domainbed_sfp.training.loop import train_to_the_end, update
from domainbed_sfp.training.recorder import measure
from domainbed_sfp.training.setup import prepare
from domainbed_sfp.training.state import State


def train(settings: RunSettings, break_lock: bool = False) -> None:
    """Computes a run, or what is left of it, into `settings.output_dir`.

    break_lock: goes on where the lock of a dead machine is in the way, on file systems without flock.

    Writes DomainBed's files: results.jsonl, out.txt, err.txt, model.pkl (unless `skip_model_save`) and, last, done; and
    the final masks, where weights are removed, into masks/.

    Raises:
        UserError: for settings or data that cannot be used, a directory that holds another run, or a loss that is
            not finite; failure.json says so where training had begun.
        AlreadyRunning: if another process holds the run.
        Interrupted: after SIGTERM, SIGINT or SIGUSR1, with a checkpoint saved.
    """
    settings = checked(settings)
    folder = Path(settings.output_dir)
    with alone(folder, break_lock):
        refuse_other_run(settings, folder)
        if records.is_done(folder):
            print(f"already done: {settings.output_dir}")
            return
        (folder / DONE).unlink(missing_ok=True)
        with tee(folder) as err, stop_signals() as stop:
            try:
                _complete(settings, folder, stop)
            except (UserError, Interrupted) as error:
                note(err, f"{type(error).__name__}: {error}")
                raise
            except OSError as error:
                where = repr(str(error.filename)) if error.filename else f"output_dir {settings.output_dir!r}"
                message = f"{where}: {error.strerror or error}; nothing written before is lost"
                raise UserError(message) from error
            except Exception as error:
                note(err, traceback.format_exc())
                crashes.keep(error, folder / ERR)
                raise


def train_as_process(settings: RunSettings, break_lock: bool = False) -> int:
    """`train` as all that a process does: its exit status, 128 + n after signal n."""
    runtime.prepare_for_training()
    try:
        train(settings, break_lock)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    return 0


def checked(settings: RunSettings) -> RunSettings:
    """The settings with hparams as records have them: 8 samples where 8.0 are asked for, since rows of tables are made
    of what records say. Raises UserError for what cannot be."""
    overrides = parse_overrides(settings.hparams)
    resolve_hparams(settings.algorithm, settings.dataset, overrides=overrides)
    check_settings(settings)
    normal = checked_overrides(settings.algorithm, settings.dataset, overrides)
    if json.dumps(normal) == json.dumps(overrides):
        return settings
    return replace(settings, hparams=json.dumps(normal, sort_keys=True))


def _complete(settings: RunSettings, folder: Path, stop: StopRequest) -> None:
    """Trains to the end, from the checkpoint if there is one."""
    setup = prepare(settings, folder)
    state = State(setup)
    state.resume()
    try:
        train_to_the_end(setup, state, stop)
    except Interrupted as stopped:
        state.save()
        raise Interrupted(
            stopped.signal_number,
            f"stopped at step {state.step} of {setup.n_steps}; the same command continues there",
        ) from None
    except UserError as error:
        state.note_failure(str(error))
        raise
    finally:
        setup.close()
    state.save_model()
    write_atomically(folder / DONE, "done")
    (folder / CHECKPOINT).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        (folder / FAILURE).unlink()


def first_record(settings: RunSettings) -> dict[str, Any]:
    """The record of step 0 as `train` makes it, computed anew; of its files only masks are written to
    `settings.output_dir`, which must exist. Raises UserError as `train` does."""
    setup = prepare(settings, Path(settings.output_dir))
    try:
        state = State(setup)
        update(setup, state)
        return _as_written(measure(setup, state))
    finally:
        setup.close()


def measure_model(settings: RunSettings, step: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint from its model's state, without what training measures (losses, times).

    Args:
        settings: of the run; masks are written to `settings.output_dir`, which must exist.
        step: of the checkpoint.
        model: its state as it was evaluated then, as `model.pkl` holds it. Weights that its masks remove count as
            removed, whatever they are.

    Raises UserError where the state is not of the run's network.
    """
    with networks.without_weights():
        setup = prepare(settings, Path(settings.output_dir))
    try:
        try:
            setup.algorithm.load_state_dict(model)
        except Exception as error:  # a state from a stranger can be anything
            message = f"not a state of {settings.algorithm} with these hparams: {error}"
            raise UserError(message.splitlines()[0]) from None
        with torch.no_grad():
            parameters = dict(setup.algorithm.named_parameters())
            for name, mask in setup.algorithm.masks().items():
                parameters[name].mul_(mask.to(parameters[name].dtype))
        state = State(setup)
        state.step = step
        return _as_written(measure(setup, state, prepare=False))
    finally:
        setup.close()


def _as_written(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a file has it."""
    return json.loads(json.dumps(record, default=float))
