"""What a sweep has handed to SLURM, and what became of it: plain files in `slurm/`, and squeue.

A batch is one job array. Its folder `slurm/BATCH/` is written before sbatch is called, and BATCH is the SLURM job's
name: whatever moment a launch dies at, squeue and disk together tell which jobs wait or run. SLURM's accounting
database is not needed and not asked.

    tasks.json                     the jobs of the array, in the order of its indices: folder and command
    INDEX.json                     written by the task itself: that it has started, and how it ended
    ARRAY_INDEX_0_log.out, .err    what the task printed
    ARRAY_submission.sh            the script given to sbatch

Nothing here imports torch: the tasks themselves use it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.training.folder import AlreadyRunning

FOLDER = "slurm"
TASKS = "tasks.json"
LAUNCH_LOCK = "launch.lock"
TASKS_FORMAT = 1

# Lines of a task's log that a report shows.
TAIL_LINES = 8

# squeue's states: of jobs that have yet to run, and of those that are over; all others run.
WAITING = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"},
)
# Over by a job's own fault or a node's, and over by somebody's decision or as it should be.
BROKEN = frozenset({"BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"})
ENDED = BROKEN | {"CANCELLED", "COMPLETED", "PREEMPTED", "REVOKED"}

# Windows, which has no SLURM, has no SIGUSR1 either.
TIME_IS_UP = 128 + getattr(signal, "SIGUSR1", 10)
# Ends that lose nothing: done, computed by another process (EX_TEMPFAIL), or stopped with a checkpoint.
HARMLESS = frozenset({0, AlreadyRunning.exit_status, 128 + signal.SIGINT, 128 + signal.SIGTERM, TIME_IS_UP})

_LOG = re.compile(r"(?P<array>\d+)_(?P<index>\d+)_0_log\.err")
_NOTE = re.compile(r"(?P<index>\d+)\.json")


class QueueUnreachable(UserError):
    """squeue is not here or does not answer."""


@dataclass(frozen=True)
class Note:
    """What a task has written about itself. exit: its status, as a shell tells it; None while it runs. step: where its
    run was saved when its time was up. why: what went wrong, where the status does not say it."""

    exit: int | None = None
    step: int = 0
    why: str = ""


@dataclass(frozen=True)
class Queued:
    """A line of squeue: the job's id, its state, and the reason for it."""

    id: str
    state: str
    reason: str

    @property
    def is_running(self) -> bool:
        return self.state not in WAITING


@dataclass(frozen=True)
class Death:
    """A task that ended badly: how, and its log where there is one."""

    how: str
    log: Path | None

    def describe(self) -> str:
        """How it ended, and the end of its log, over several lines."""
        tail = _tail(self.log) if self.log else []
        if not tail:
            return f"  {self.how}; it said nothing"
        return "\n".join([f"  {self.how}; {self.log} ends with:", *(f"    {line}" for line in tail)])


@dataclass
class Standing:
    """What SLURM has had to do with one job of the sweep: its place in the queue, how often it died there, and its
    last death, unless a later batch has ended better."""

    queued: Queued | None = None
    deaths: int = 0
    death: Death | None = None


def launch_lock(root: Path) -> Path:
    """The lock of who looks at the queue and submits."""
    return root / FOLDER / LAUNCH_LOCK


def write_batch(root: Path, name: str, tasks: Sequence[tuple[Path, Sequence[str]]]) -> Path:
    """Makes the folder of a batch of (the job's folder, its command). Raises OSError where it cannot be written."""
    batch = root / FOLDER / name
    batch.mkdir(parents=True)
    contents = {
        "format": TASKS_FORMAT,
        "tasks": [{"folder": str(folder.absolute()), "command": list(command)} for folder, command in tasks],
    }
    write_atomically(batch / TASKS, json.dumps(contents, indent=1) + "\n")
    return batch


def read_tasks(batch: Path) -> list[dict[str, Any]]:
    """The tasks of a batch: mappings with `folder` and `command`. Raises UserError for a file that is not a list of
    them."""
    try:
        contents = strict_json.parse((batch / TASKS).read_bytes())
        if contents["format"] != TASKS_FORMAT:
            raise ValueError(f"format {contents['format']!r}, expected {TASKS_FORMAT}")
        return [{"folder": str(task["folder"]), "command": list(task["command"])} for task in contents["tasks"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{str(batch / TASKS)!r} is not a list of tasks ({error})") from None


def write_note(batch: Path, index: int, note: Note) -> None:
    """Replaces what a task says about itself."""
    write_atomically(batch / f"{index}.json", json.dumps(asdict(note)) + "\n")


def read_note(batch: Path, index: int) -> Note | None:
    """What a task says about itself; None where it has not started, or says nothing that can be read."""
    try:
        return Note(**strict_json.parse((batch / f"{index}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def look(root: Path) -> dict[str, Standing]:
    """The standing of every job that was ever handed to SLURM, by the name of its folder.

    Raises QueueUnreachable where there are batches and squeue does not answer.
    """
    batches = list(_batches(root))
    if not batches:
        return {}
    queue = read_queue([batch.name for batch in batches])
    standings: dict[str, Standing] = {}
    for batch in batches:
        logs, started = _files(batch)
        for index, name in enumerate(job_names(batch)):
            standing = standings.setdefault(name, Standing())
            line = queue.get((batch.name, index))
            if line and line.state not in ENDED:
                standing.queued = line
                continue
            broken = line.state if line and line.state in BROKEN else None
            if index not in logs and index not in started and not broken:
                continue  # it never ran: cancelled while it waited, or never submitted
            standing.death = _death(read_note(batch, index) if index in started else None, broken, logs.get(index))
            standing.deaths += standing.death is not None
    return standings


def read_queue(names: Sequence[str]) -> dict[tuple[str, int], Queued]:
    """What squeue knows of the arrays with these names, by (name, index), for some minutes after their end too."""
    if shutil.which("squeue") is None:
        raise QueueUnreachable("squeue is not on PATH: what SLURM still has of this sweep cannot be told here")
    command = [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        f"--name={','.join(names)}",
        "--format=%F|%K|%j|%T|%r",
    ]
    try:
        asked = ask(command, 120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueUnreachable(f"squeue does not answer: {error}") from None
    if asked.returncode:
        raise QueueUnreachable(f"squeue does not answer: {one_line(asked.stderr) or f'status {asked.returncode}'}")
    queue: dict[tuple[str, int], Queued] = {}
    for line in asked.stdout.splitlines():
        array, index, name, state, reason = [*line.split("|", 4), "", "", "", ""][:5]
        if not index.isdigit():
            continue
        known = queue.get((name, int(index)))
        if known is None or known.state in ENDED:
            queue[name, int(index)] = Queued(f"{array}_{index}", state, reason)
    return queue


def ask(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """What a command of SLURM answers, whatever the locale. Raises OSError or TimeoutExpired."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds)


def forget(root: Path, names: Collection[str]) -> None:
    """Removes what tasks have said about these jobs, and with it their deaths."""
    for batch in _batches(root):
        chosen = {index for index, name in enumerate(job_names(batch)) if name in names}
        logs, started = _files(batch)
        for index in chosen & started:
            (batch / f"{index}.json").unlink(missing_ok=True)
        for index in chosen & set(logs):
            for log in (logs[index], logs[index].with_suffix(".out")):
                log.unlink(missing_ok=True)


def one_line(text: str) -> str:
    """What a SLURM command complains about, in one line."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))


def _death(note: Note | None, broken: str | None, log: Path | None) -> Death | None:
    """How a task that is no longer in the queue died; None where nothing was lost."""
    if note is None:
        return Death(f"it did not start ({broken or 'SLURM no longer says why'})", log)
    if note.exit is None:
        return Death(f"killed with its node or by SLURM ({broken or 'SLURM no longer says why'})", log)
    if note.why:
        return Death(note.why, log)
    if note.exit in HARMLESS:
        return None
    if note.exit > 128 and note.exit - 128 in set(signal.Signals):
        return Death(f"killed by {signal.Signals(note.exit - 128).name}", log)
    return Death(f"exit status {note.exit}", log)


def _batches(root: Path) -> Iterator[Path]:
    """The folders of all batches, oldest first: their names begin with the time."""
    try:
        names = sorted(entry.name for entry in os.scandir(root / FOLDER) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if (root / FOLDER / name / TASKS).is_file():
            yield root / FOLDER / name


@cache
def job_names(batch: Path) -> tuple[str, ...]:
    """The jobs' folders of a batch, by name, in the order of its indices."""
    # A batch never changes, and a live table asks every few seconds.
    return tuple(Path(task["folder"]).name for task in read_tasks(batch))


def _files(batch: Path) -> tuple[dict[int, Path], set[int]]:
    """The error logs of a batch by index, and the indices of the tasks that have started."""
    logs: dict[int, Path] = {}
    started: set[int] = set()
    for entry in os.scandir(batch):
        if match := _LOG.fullmatch(entry.name):
            logs[int(match["index"])] = Path(entry.path)
        elif match := _NOTE.fullmatch(entry.name):
            started.add(int(match["index"]))
    return logs, started


def _tail(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            return file.read().decode(errors="replace").strip().splitlines()[-TAIL_LINES:]
    except OSError:
        return []
