"""What one task of a SLURM array does: `python -m domainbed_sfp.sweep.launchers.slurm_task BATCH`.

It computes its job of the batch as a local launch would, notes how that ended, and asks SLURM for another turn where
the time was up. The run itself saves its checkpoint at SIGUSR1, which SLURM sends to all processes of the task some
time before its limit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from domainbed_sfp.core import crashes, surroundings
from domainbed_sfp.runs.records import saved_step
from domainbed_sfp.sweep.slurm_batches import TIME_IS_UP, Note, ask, one_line, read_note, read_tasks, write_note


def main(arguments: list[str] | None = None) -> int:
    """Runs the task that SLURM_ARRAY_TASK_ID names and returns its exit status."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    batch, index = Path(folder), int(os.environ["SLURM_ARRAY_TASK_ID"])
    task = read_tasks(batch)[index]
    before = (read_note(batch, index) or Note()).step
    write_note(batch, index, Note(step=before))
    status = _run(task["command"])
    if status != TIME_IS_UP:
        write_note(batch, index, Note(status, before))
        return status
    step = saved_step(Path(task["folder"]))
    if step <= before:
        # Another turn would end as this one did.
        why = f"no step was saved within the time limit (it stands at step {step}); raise --slurm_time"
        print(f"error: {why}", file=sys.stderr)
        write_note(batch, index, Note(status, before, why))
        return status
    write_note(batch, index, Note(status, step))
    if refusal := _requeue():
        print(f"SLURM does not requeue this job: {refusal}; the next launch continues it", file=sys.stderr)
    return status


def thread_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the run: as many threads as SLURM has given cores, unless the user has set a number."""
    names = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")
    cores = next(filter(None, (surroundings.whole_number(environment.get(name)) for name in names)), 1)
    return surroundings.with_threads(environment, cores)


def _run(command: list[str]) -> int:
    """The command's exit status as a shell tells it: 128 + n for signal n."""
    # All processes of the task get SLURM's signals. SIGUSR1 is held back until the run listens (training/interruption):
    # one that comes while it still imports is not lost and does not kill it. The others only must not end us first.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    status = subprocess.Popen(command, env=thread_environment(os.environ)).wait()
    return status if status >= 0 else 128 - status


def _requeue() -> str:
    """Asks SLURM to start this task again; what it answers where it does not want to."""
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        asked = ask(["scontrol", "requeue", job], 120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if asked.returncode == 0 else one_line(asked.stderr) or f"scontrol ends with status {asked.returncode}"


if __name__ == "__main__":
    sys.exit(crashes.guarded("a task of SLURM", main))
