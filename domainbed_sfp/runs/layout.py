"""Where the files of runs and sweeps lie in a directory of runs, and what to say where they do not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from domainbed_sfp.core.errors import UserError

RESULTS = "results.jsonl"
DONE = "done"
FAILURE = "failure.json"
CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.pkl"
LOCK = "run.lock"
OUT, ERR = "out.txt", "err.txt"
# All that was launched from here, and what each launch knew of it by the hash of that: they survive `cp -r` of one
# sweep's files over those of another.
SWEEP = "sweep.json"
SWEEPS = "sweep-" + 12 * "[0-9a-f]" + ".json"
# A folder with the records of many finished runs in one file, named by the hash of that.
PACKED = "packed-" + 12 * "[0-9a-f]"

# How far below a folder runs are looked for, and how many folders with runs are named.
_DEPTH = 3
_NAMED = 3


def no_runs(root: Path) -> UserError:
    """The error for a directory without runs: the folders in it that hold some, where there are any."""
    below = runs_below(root)
    if below:
        hint = f"{named(below)}: give one of them, or copy what they hold into one folder"
    else:
        hint = f"expected subdirectories with a {RESULTS}"
    return UserError(f"--input_dir {root} holds no run with a record; {hint}")


def runs_below(root: Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """How many runs the folders in `root` (those of `names`, else all) hold that are not runs themselves, by the
    folders' paths from there."""
    found: dict[str, int] = {}
    for name in sorted(os.listdir(root) if names is None else names):
        for folder, below, files in os.walk(root / name):
            where = Path(folder).parent.relative_to(root)
            if RESULTS in files:
                below.clear()  # a run holds no runs
                if where.parts:
                    found[where.as_posix()] = found.get(where.as_posix(), 0) + 1
            elif len(where.parts) + 1 >= _DEPTH:
                below.clear()
            below.sort()
    return found


def named(below: dict[str, int]) -> str:
    """What `runs_below` has found, in words."""
    parts = [f"{name} holds {count} run{'' if count == 1 else 's'}" for name, count in list(below.items())[:_NAMED]]
    if len(below) > _NAMED:
        parts.append(f"and {len(below) - _NAMED} more")
    return ", ".join(parts)
