"""Where the records of runs lie: in a folder of each run, or packed, as `sweep pack` leaves those of finished runs.

`packed-HASH/results.jsonl` holds the lines of one run after those of another, as their own files had them: a folder
that DomainBed's collect_results reads like any other. A run is called by the last part of its `args.output_dir`, which
was its folder. HASH is the file's, so that packed sweeps can be copied together, and a damaged copy is known.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.layout import DONE, PACKED, RESULTS, no_runs
from domainbed_sfp.runs.record_lines import Lines, parse


def folder_of(data: bytes) -> str:
    """What the folder of a file with these bytes is called, whichever line breaks a checkout has given them."""
    text = data.replace(b"\r\n", b"\n")
    return f"packed-{hashlib.sha256(text).hexdigest()[:12]}"


def name_of(args: dict[str, Any]) -> str:
    """The folder of the run whose records have these `args`; empty where they do not say."""
    return re.split(r"[/\\]", str(args.get("output_dir") or "").rstrip("/\\"))[-1]


def is_packed(name: str) -> bool:
    """Whether a folder of this name holds packed records."""
    return fnmatchcase(name, PACKED)


def runs_in(folder: Path) -> dict[str, Lines]:
    """Where in a packed folder the records of each run lie, by the runs' names in file order; none where it has no
    records. Raises UserError where they are not what was packed, or cannot be read."""
    path = folder / RESULTS
    try:
        found = path.stat()
        return _runs_in(path, found.st_mtime_ns, found.st_size)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def packed_runs(root: Path, names: Iterable[str] | None = None) -> dict[str, Lines]:
    """Where the records of each packed run of a directory lie; `names`: what is in the directory, where that is known.

    Raises UserError as `runs_in` does.
    """
    runs: dict[str, Lines] = {}
    for folder in _folders(root, names):
        runs = {**runs_in(folder), **runs}
    return runs


def places(root: Path, names: Iterable[str], warn: Callable[[str], None]) -> list[tuple[str, Lines]]:
    """Name and lines of all that may be a run in a directory that holds `names`, in their order.

    Each run counts once, which `warn` is told where it lies twice: by its folder where that is finished, else as it is
    packed. Raises UserError as `runs_in` does.
    """
    names = list(names)
    packed = packed_runs(root, names)
    listed = Counter(run for name in names for run in (runs_in(root / name) if is_packed(name) else (name,)))
    if twice := [name for name in packed if listed[name] > 1]:
        warn(f"{root}: packed, and there once more: {', '.join(twice[:3])} ({len(twice)} in all); sweep pack tidies up")
    away = {name: where for name, where in packed.items() if not (root / name / DONE).exists()}
    return [(name, away.get(name) or Lines(root / name / RESULTS)) for name in listed]


def run_folders(input_dir: str | os.PathLike[str], warn: Callable[[str], None]) -> list[Path]:
    """The folders of all runs of a directory that have records, of packed ones those that they had; or the one run
    that the directory is.

    Raises UserError where there are none, naming the folders below that hold some.
    """
    root = Path(input_dir)
    if not root.is_dir():
        raise UserError(f"--input_dir {root}: expected a directory of runs")
    if is_packed(root.resolve().name):
        raise UserError(f"--input_dir {root} is a sweep's packed records; expected the directory above them")
    found = [root / name for name, where in places(root, os.listdir(root), warn) if where.path.is_file()]
    if not found and not (root / RESULTS).is_file():
        raise no_runs(root)
    return sorted(found) or [root]


def lines_of(directory: Path) -> Lines:
    """Where the records of a run lie, whose folder is or was `directory`. Raises UserError as `runs_in` does."""
    if not (directory / DONE).exists():
        for folder in _folders(directory.parent):
            if where := runs_in(folder).get(directory.name):
                return where
    return Lines(directory / RESULTS)


def _folders(root: Path, names: Iterable[str] | None = None) -> list[Path]:
    """The packed folders of a directory, in the order of their names."""
    if names is None:
        try:
            names = os.listdir(root)
        except OSError:
            names = ()
    return [root / name for name in sorted(filter(is_packed, names))]


@lru_cache(maxsize=64)
def _runs_in(path: Path, _changed: int, _size: int) -> dict[str, Lines]:
    data = path.read_bytes()
    if folder_of(data) != path.parent.name:
        raise UserError(
            f"{str(path)!r} is not what was packed: its folder would be called {folder_of(data)}; copy it anew, or "
            "give the folder that name where the change is meant"
        )
    runs: dict[str, Lines] = {}
    begin = 0
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            name = name_of(parse(line)["args"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a record ({type(error).__name__}: {error})") from error
        earlier = runs.setdefault(name, Lines(path, begin, 0, number))
        if earlier.begin + earlier.size != begin:
            raise UserError(f"{path}, line {number}: run {name!r} has other lines before those of another run")
        runs[name] = Lines(path, earlier.begin, earlier.size + len(line) + 1, earlier.number)
        begin += len(line) + 1
    return runs
