"""The folder of a run: who holds it, and whose it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from domainbed_sfp.core import locks, provenance
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError, spelled
from domainbed_sfp.runs import checkpoints, records
from domainbed_sfp.runs.layout import CHECKPOINT, ERR, FAILURE, LOCK, OUT, RESULTS
from domainbed_sfp.runs.settings import RunSettings, identity_of


class AlreadyRunning(locks.Held):
    """Another process is computing this run."""

    exit_status = 75  # EX_TEMPFAIL: a launcher knows it by this


@contextmanager
def alone(folder: Path, break_lock: bool) -> Iterator[None]:
    """Makes the folder, and holds the run's lock for the block.

    Raises AlreadyRunning where another process holds it, and UserError where the folder cannot be written.
    """
    lock = folder / LOCK
    with ExitStack() as held:
        try:
            new = [one for one in (folder, *folder.parents) if not one.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            if break_lock and (broken := locks.break_lock(lock)):
                warn(f"removed the lock {broken.describe()}")
            # A moment's patience: whoever asks for the run's state holds the lock for an instant.
            held.enter_context(locks.hold(lock, 2, "computing this run", "go on with --break_lock"))
        except locks.Held as error:
            raise AlreadyRunning(str(error)) from None
        except OSError as error:
            raise UserError(f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}") from error
        try:
            yield
        except UserError:
            held.close()
            _remove_refused(new)
            raise


def _remove_refused(new: list[Path]) -> None:
    """Removes the folders that a run made which was refused before its first step: nothing of it is in them."""
    if new and not any((new[0] / name).exists() for name in (CHECKPOINT, RESULTS, FAILURE)):
        with suppress(OSError):  # something else has been put there
            for name in (OUT, ERR, LOCK):
                (new[0] / name).unlink(missing_ok=True)
            for folder in new:
                folder.rmdir()


def refuse_other_run(settings: RunSettings, folder: Path) -> None:
    """Raises UserError if the folder holds a run with other settings, or one that began from other weights."""
    earlier = _checkpoint_of(folder)
    if earlier is None:
        with suppress(FileNotFoundError):
            earlier = next(reversed(list(records.read_records(folder, lambda message: None))), None)
    if earlier is None:
        return
    ours, theirs = identity_of(asdict(settings)), identity_of(earlier["args"])
    for name in ours:
        # DomainBed's records do not have our flags.
        if name in theirs and theirs[name] != ours[name]:
            raise UserError(
                f"output_dir {settings.output_dir!r} holds another run ({name} {spelled(theirs[name], [ours[name]])} "
                f"there, {spelled(ours[name], [theirs[name]])} here); choose another --output_dir, or remove that one"
            )
    weights = ours["hparams"].get("weights")
    here, there = provenance.weights_digest(weights), earlier.get("weights_digest")
    if here and there and here != there:
        raise UserError(
            f"output_dir {settings.output_dir!r} holds a run that began from other weights (the file {weights!r} had "
            f"hash {there} then, {here} now); choose another --output_dir, or remove that one"
        )


def refuse_other_data(settings: RunSettings, folder: Path, code: str | None, data_digest: str | None) -> None:
    """Raises UserError where the folder's checkpoint was made by another version of an outside algorithm, or on other
    images, as `Folder` or an incomplete copy can hold: it must not go on with these."""
    earlier = _checkpoint_of(folder)
    if earlier and earlier.get("code") != code:
        raise UserError(
            f"output_dir {settings.output_dir!r} holds a run of {settings.algorithm} by other code (the files of "
            f"its package have hash {earlier.get('code')} there, {code} here); choose another --output_dir, "
            "or remove that one"
        )
    if earlier and earlier["data_digest"] != data_digest:
        raise UserError(
            f"output_dir {settings.output_dir!r} holds a run on other images than those in "
            f"--data_dir {settings.data_dir!r}; choose another --output_dir"
        )


def _checkpoint_of(folder: Path) -> Mapping[str, Any] | None:
    """`args`, `data_digest`, `code` and `weights_digest` of the run whose checkpoint is in the folder."""
    return checkpoints.read_state(folder / CHECKPOINT) if (folder / CHECKPOINT).exists() else None
