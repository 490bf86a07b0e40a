"""Finished runs on disk: from an output folder back to the algorithm that was trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.core import crashes
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.tensor_files import load_tensors
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.runs import records
from domainbed_sfp.runs.layout import DONE, MODEL, RESULTS
from domainbed_sfp.runs.packed import is_packed, packed_runs

# Channels, pixels, classes or domains beyond this are no network's.
MOST = 1_000_000


@dataclass(frozen=True)
class TrainedRun:
    """A run at its end. algorithm: in evaluation mode, on the CPU, in fp32. record: the last one."""

    folder: Path
    algorithm: Algorithm
    args: Mapping[str, Any]
    hparams: Mapping[str, Any]
    record: Mapping[str, Any]


def load_run(folder: str | os.PathLike[str]) -> TrainedRun:
    """The trained algorithm of a finished run, from its model.pkl.

    Raises UserError where the folder is no run, or the run is not finished, not at its final compression, was trained
    with `--skip_model_save`, or its model.pkl is of another network or cannot be read.
    """
    folder = Path(folder)
    record = _last_record(folder)
    model = folder / MODEL
    if not model.exists():
        raise UserError(
            f"run {str(folder)!r} has no {MODEL}: it was trained with --skip_model_save, or the file was removed; "
            "train it again without that flag"
        )
    try:
        saved = _checked(load_tensors(model))
    except (ValueError, OSError) as error:
        raise UserError(
            f"{str(model)!r} cannot be read as a trained model: {error}; remove the run's folder and train it again"
        ) from error
    except KeyError as error:
        raise UserError(f"{str(model)!r} is not the file of a trained model: it has no {error}") from error
    hparams, args, shape = saved["model_hparams"], saved["args"], tuple(saved["model_input_shape"])
    info = registry.get(args["algorithm"])
    steps = args.get("steps") or get_dataset_class(args["dataset"]).N_STEPS
    try:
        with networks.without_weights():
            algorithm: Algorithm = info.make(shape, saved["model_num_classes"], saved["model_num_domains"], hparams)
    except KeyError as error:
        raise UserError(
            f"{str(model)!r} was saved by another version of {args['algorithm']}: it has no hparam {error}; use the "
            "version that its records name"
        ) from error
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if crashes.advice(error):
            raise
        raise UserError(
            f"{str(model)!r} has settings that no {args['algorithm']} can have: {crashes.one_line(error)}"
        ) from error
    algorithm.total_steps = steps
    try:
        algorithm.load_state_dict(saved["model_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{str(model)!r} is of another network than its hparams say: {reason}") from error
    # DomainBed's own loop does not record it.
    if not record.get("final_compression", algorithm.at_final_compression()):
        raise UserError(
            f"run {str(folder)!r} ended before its final compression (sparsity {algorithm.sparsity():.2f} at step "
            f"{record['step']}); train it for more steps"
        )
    return TrainedRun(folder, algorithm.eval(), args, hparams, record)


def _checked(saved: Any) -> dict[str, Any]:
    """The contents of a model.pkl, with what they must hold. Raises ValueError, or KeyError for what is missing."""
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}")
    parts = ("model_input_shape", "model_num_classes", "model_num_domains", "model_hparams", "args", "model_dict")
    if missing := [name for name in parts if name not in saved]:
        raise KeyError(missing[0])
    for name in ("model_hparams", "args", "model_dict"):
        if not isinstance(saved[name], dict):
            raise ValueError(f"{name} is a {type(saved[name]).__name__}")
    for name in ("algorithm", "dataset"):
        if not isinstance(saved["args"][name], str):
            raise ValueError(f"{name} in its args is {saved['args'][name]!r}")
    shape = saved["model_input_shape"]
    sizes = [*shape, saved["model_num_classes"], saved["model_num_domains"]] if isinstance(shape, (list, tuple)) else []
    if len(sizes) != 5 or not all(type(size) is int and 0 < size < MOST for size in sizes):
        raise ValueError("its input shape, classes and domains are not five numbers from 1 on")
    steps = saved["args"].get("steps")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"steps in its args is {steps!r}")
    return saved


def load_algorithm(folder: str | os.PathLike[str]) -> Algorithm:
    """The trained algorithm of a finished run.

    Parameters
    ----------
    folder : path
        The `output_dir` of the run, trained without `skip_model_save`.

    Returns
    -------
    Algorithm
        In evaluation mode, on the CPU: `predict(x)` gives logits, `export()` a plain network, `masks()` what lives.

    Raises
    ------
    UserError
        As `load_run` does.
    """
    return load_run(folder).algorithm


def _last_record(folder: Path) -> dict[str, Any]:
    """The last record of a run that is finished. Raises UserError where it is not."""
    results = folder / RESULTS
    if not results.is_file() or is_packed(folder.resolve().name):
        raise UserError(f"{str(folder)!r} is no run: {_what_is_there(folder)}")
    try:
        last = records.last_record(folder)
    except OSError as error:
        raise UserError(f"{str(results)!r} cannot be read: {error.strerror or error}") from error
    if not (folder / DONE).exists():
        reached = records.last_step(folder)
        step = f"its last record is of step {reached}" if reached >= 0 else "it has no record yet"
        raise UserError(f"run {str(folder)!r} is not finished ({step}); the command that began it continues it")
    if last is None:
        is_torn = records.last_step(folder) >= 0
        what = "has a last record that is torn; train the run again" if is_torn else "holds no record"
        raise UserError(f"{str(results)!r} {what}")
    return last


def _what_is_there(folder: Path) -> str:
    if folder.name in packed_runs(folder.parent) or is_packed(folder.resolve().name):
        return "it is packed, and sweep pack has kept its records alone; train it anew, elsewhere"
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "expected the output folder of a run, and it is a file"
    below = sorted(path.parent.name for path in folder.glob(f"*/{RESULTS}") if not is_packed(path.parent.name))
    if not below and (packed := packed_runs(folder)):
        return f"it holds {len(packed)} packed runs, and sweep pack has kept their records alone"
    if below:
        return f"it holds {len(below)} runs; choose one of them, such as {str(folder / below[0])!r}"
    return f"expected the output folder of a run, with {RESULTS}, {DONE} and {MODEL}"
