"""Packing a sweep: the records of its finished runs become one file, and their folders go."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from domainbed_sfp.core import locks
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.runs.layout import DONE, LOCK, RESULTS
from domainbed_sfp.runs.packed import folder_of, is_packed, name_of, packed_runs, runs_in
from domainbed_sfp.runs.record_lines import Lines, last_of, numbered_records
from domainbed_sfp.sweep.directory import SWEEP_LOCK, WAY_ON, SweepDirectory

# What a packed sweep needs no more, as its records say it or nothing does.
_IMPLIED = (RESULTS, DONE, LOCK)


@dataclass
class _Found:
    """A directory of runs before it is packed: the lines of each run by its name, folders that go once these are
    packed, and why others stay."""

    runs: dict[str, list[bytes]] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    staying: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, lines: list[bytes], place: Path) -> None:
        """Raises UserError where the run is known with other records."""
        if self.runs.setdefault(name, lines) != lines:
            raise UserError(
                f"run {name!r} has other records in {str(place)!r} than in {str(self.places[name])!r}; move one of "
                "them out of the sweep"
            )
        self.places.setdefault(name, place)


def pack(output_dir: str, drop: Sequence[str] = (), *, break_lock: bool = False) -> int:
    """Moves the records of all finished runs into `packed-HASH/results.jsonl`, beside those packed before; returns the
    exit status.

    drop: files and folders of runs, beside their records, that may be lost.

    Raises UserError, with nothing changed, where a run holds anything else, or two runs of one name differ. The new
    file is written and read back before anything is removed: killed at any moment, no record is lost or counts twice,
    and the next call ends the work.
    """
    root = Path(output_dir)
    if not root.is_dir():
        raise UserError(f"--output_dir {output_dir}: there is no such folder")
    if break_lock:
        for broken in SweepDirectory(root).break_locks([]):
            warn(f"removed the lock {broken.describe()}")
    try:
        with locks.hold(root / SWEEP_LOCK, 60, "launching or packing this sweep", WAY_ON):
            found = _look(root)
            if not found.runs:
                raise UserError(f"--output_dir {output_dir} holds no finished run to pack{_why(found)}")
            _refuse_losses(root, found.folders, drop)
            target = _write(root, found.runs)
            _remove_packed(root, target)
            removed = sum(_remove(folder, found.runs[folder.name]) for folder in found.folders)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.filename or ''} {error.strerror or error}") from error
    records = sum(len(lines) for lines in found.runs.values())
    print(f"{target / RESULTS} holds {records:,} records of {len(found.runs):,} runs; {removed:,} folders are gone.")
    for reason, names in found.staying.items():
        print(f"Left as they are ({', '.join(names[:3])}; {len(names)} in all): {reason}.")
    return 0


def _look(root: Path) -> _Found:
    found = _Found()
    for folder in sorted(path for path in root.iterdir() if is_packed(path.name)):
        for name, where in runs_in(folder).items():
            found.add(name, _lines(where), folder)
    packed = packed_runs(root).keys()
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not is_packed(path.name)):
        lines = Lines(folder / RESULTS)
        if not lines.path.is_file():
            if folder.name in packed:  # what a removal that was killed has left
                found.folders.append(folder)
        elif folder.name in packed and _lines(lines) == found.runs[folder.name]:
            found.folders.append(folder)
        elif reason := _reason_to_stay(folder):
            found.staying.setdefault(reason, []).append(folder.name)
        else:
            found.add(folder.name, _lines(lines), folder)
            found.folders.append(folder)
    return found


def _lines(where: Lines) -> list[bytes]:
    return [line for line in where.read() if line]


def _reason_to_stay(folder: Path) -> str | None:
    """Why a folder with records cannot be packed; None where it can."""
    lines = Lines(folder / RESULTS)
    if locks.is_held(folder / LOCK):
        return "they run"
    if not (folder / DONE).exists() or last_of(lines) is None:
        return "they are not finished"
    args = [record.get("args") for _, record in numbered_records(lines, lambda message: None)]
    if any(one != args[0] for one in args) or not isinstance(args[0], dict):
        return "their records are of several runs"
    if name_of(args[0]) != folder.name:
        return "their folders have other names than args.output_dir of their records"
    return None


def _refuse_losses(root: Path, folders: Iterable[Path], drop: Sequence[str]) -> None:
    """Raises UserError where folders hold what is neither packed nor to be dropped, with what that is."""
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for folder in folders:
        for entry in folder.iterdir():
            size = sum(file.lstat().st_size for file in (entry, *entry.rglob("*")) if not file.is_dir())
            if entry.name not in (*_IMPLIED, *drop) and size:
                counts[entry.name] = counts.get(entry.name, 0) + 1
                sizes[entry.name] = sizes.get(entry.name, 0) + size
    if counts:
        told = ", ".join(f"{name} ({sizes[name] / 1e6:,.1f} MB of {counts[name]:,})" for name in sorted(counts))
        names = " ".join(shlex.quote(name) for name in sorted({*counts, *drop}))
        raise UserError(
            f"--output_dir {root}: packing keeps records alone, and its runs also hold {told}; add --drop {names}, "
            "and these are gone for good"
        )


def _write(root: Path, runs: Mapping[str, list[bytes]]) -> Path:
    """The folder with all lines in one file, read back. Raises UserError where it is not what was written."""
    data = b"".join(line + b"\n" for name in sorted(runs) for line in runs[name])
    target = root / folder_of(data)
    if not runs_in(target):
        target.mkdir(exist_ok=True)
        write_atomically(target / RESULTS, data)
    if {name: _lines(where) for name, where in runs_in(target).items()} != runs:
        raise UserError(f"{target / RESULTS} does not read back as it was written; nothing is removed")
    return target


def _remove_packed(root: Path, kept: Path) -> None:
    """Removes the files that are part of the `kept` one, and what writes that were killed have left."""
    for folder in [path for path in root.iterdir() if is_packed(path.name) and path != kept]:
        (folder / RESULTS).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _remove(folder: Path, lines: list[bytes]) -> bool:
    """Removes a run's folder, unless its records have changed or it is being computed.

    `done` goes first and the records next: whatever is left then counts for nothing beside the packed run.
    """
    try:
        with locks.hold(folder / LOCK, 0, "computing this run", WAY_ON):
            results = Lines(folder / RESULTS)
            if results.path.exists() and _lines(results) != lines:
                return False
            for name in (DONE, RESULTS):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder)
            return True
    except locks.Held:
        return False
    except OSError as error:
        warn(f"{folder} stays: {error.strerror or error}")
        return False


def _why(found: _Found) -> str:
    return "".join(f"; of {len(names)}, {reason}" for reason, names in found.staying.items())
