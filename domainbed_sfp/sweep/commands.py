"""The actions of `domainbed-sfp sweep`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

from domainbed_sfp import registry
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.errors import UserError
from domainbed_sfp.sweep.jobs import State, SweepDirectory, command_line
from domainbed_sfp.sweep.launchers import Task, get_launcher
from domainbed_sfp.sweep.spec import SweepSpec, default_datasets, make_jobs, read_spec

__all__ = ["default_spec", "delete_incomplete", "launch", "read_spec", "status"]


def default_spec() -> SweepSpec:
    """What DomainBed's sweep does without flags: all data sets and all algorithms."""
    return SweepSpec(datasets=default_datasets(), algorithms=list(registry.names()))


def launch(
    spec: SweepSpec,
    data_dir: str | None,
    output_dir: str,
    *,
    launcher: str = "local",
    slots: int = 1,
    ask: bool = True,
    cache_dir: str | None = None,
) -> int:
    """Runs every job that is not done. Returns 0 when all are, 1 where some failed, 130 after an interruption."""
    if slots < 1:
        raise UserError(f"--jobs: expected at least 1, got {slots}")
    start = get_launcher(launcher)
    jobs = make_jobs(spec, data_dir)
    for dataset in spec.datasets:
        get_dataset_class(dataset).check_files(data_dir)
    directory = SweepDirectory(output_dir, data_dir)
    directory.register(jobs)
    states = {job: directory.state(job) for job in jobs}
    to_launch = [job for job, state in states.items() if state is not State.DONE]
    print(_summary(list(states.values())))
    print(f"About to launch {len(to_launch)} jobs.", flush=True)
    if ask and to_launch and launcher != "dummy" and not _confirmed():
        return 0
    tasks = []
    for job in to_launch:
        args = job.train_args(
            data_dir, directory.job_dir(job), skip_model_save=spec.skip_model_save, cache_dir=cache_dir
        )
        tasks.append(Task(job, command_line(args)))
    outcome = start(tasks, directory, slots)
    print(_summary([directory.state(job) for job in jobs]))
    if outcome.interrupted:
        print("Interrupted; the same command continues where it was.")
        return 130
    for job, reason in outcome.failures:
        print(f"failed: {job.describe()}: {reason.strip().splitlines()[-1].strip()}", file=sys.stderr)
    return 1 if outcome.failures else 0


def status(spec: SweepSpec, data_dir: str | None, output_dir: str) -> int:
    """Prints every job's state and their numbers."""
    directory = SweepDirectory(output_dir, data_dir)
    jobs = make_jobs(spec, data_dir)
    states = [directory.state(job) for job in jobs]
    for job, state in zip(jobs, states):
        print(f"{state.value}: {directory.job_dir(job)} {job.describe()}")
    print(_summary(states))
    return 0


def delete_incomplete(spec: SweepSpec, data_dir: str | None, output_dir: str, *, ask: bool = True) -> int:
    """Removes the folders of jobs that have begun and are neither done nor running."""
    directory = SweepDirectory(output_dir, data_dir)
    jobs = make_jobs(spec, data_dir)
    unfinished = [job for job in jobs if directory.state(job) in (State.INCOMPLETE, State.FAILED)]
    print(_summary([directory.state(job) for job in jobs]))
    print(f"About to delete {len(unfinished)} jobs.", flush=True)
    if ask and unfinished:
        if not sys.stdin.isatty():
            raise UserError("deleting without a terminal to ask on needs --skip_confirmation")
        if not _confirmed():
            return 0
    directory.delete(unfinished)
    print(f"Deleted {len(unfinished)} jobs!")
    return 0


def _summary(states: Sequence[State]) -> str:
    counts = Counter(states)
    line = (
        f"{len(states)} jobs: {counts[State.DONE]} done, {counts[State.INCOMPLETE]} incomplete, "
        f"{counts[State.NOT_LAUNCHED]} not launched"
    )
    for state in (State.RUNNING, State.FAILED):
        if counts[state]:
            line += f", {counts[state]} {state.value.lower()}"
    return line + "."


def _confirmed() -> bool:
    """Asks on a terminal, as DomainBed does; a script that launches means it."""
    if not sys.stdin.isatty():
        return True
    if input("Are you sure? (y/n) ").lower().strip().startswith("y"):
        return True
    print("Nevermind!")
    return False
