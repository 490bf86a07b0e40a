"""The actions of `domainbed-sfp sweep`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core import locks
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError, check_range
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.base import not_as_published
from domainbed_sfp.runs.layout import LOCK, named, runs_below
from domainbed_sfp.runs.manifests import read_manifests, several_sweeps
from domainbed_sfp.runs.packed import packed_runs
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.capacity import choose_slots, job_environment, usable_cores, usable_memory, visible_gpus
from domainbed_sfp.sweep.directory import State, SweepDirectory, amount, failure_reason
from domainbed_sfp.sweep.job import Job
from domainbed_sfp.sweep.launchers import slurm
from domainbed_sfp.sweep.launchers.base import LAUNCHERS, Outcome, Task
from domainbed_sfp.sweep.launchers.local import required_gpus
from domainbed_sfp.sweep.launchers.slurm import SlurmOptions
from domainbed_sfp.sweep.slurm_batches import QueueUnreachable, Standing
from domainbed_sfp.sweep.spec import SweepSpec, check_rows, default_datasets, drawn_compression, make_jobs, read_spec
from domainbed_sfp.sweep.watch import Watch, summary

__all__ = ["check_rows", "default_spec", "delete_incomplete", "holds_a_sweep", "launch", "read_spec", "status"]


def default_spec() -> SweepSpec:
    """What DomainBed's sweep does without flags: all data sets and all algorithms."""
    return SweepSpec(datasets=default_datasets(), algorithms=list(registry.names()))


def launch(
    spec: SweepSpec,
    data_dir: str | None,
    output_dir: str,
    *,
    launcher: str = "local",
    slots: int | None = None,
    ask: bool = True,
    cache_dir: str | None = None,
    slurm_options: SlurmOptions | None = None,
    break_lock: bool = False,
) -> int:
    """Runs every job that is not done, or hands it to SLURM. Jobs in SLURM's queue are left to it by every launcher.

    slots: jobs at the same time on this machine; None chooses, and says what.
    Returns 0 when all are done or submitted, 1 where some failed, 130 after an interruption.
    """
    if slots is not None:
        check_range("--jobs", slots, 1)
    start: Callable[..., Outcome] = LAUNCHERS.get(launcher)
    if launcher == "slurm":
        slurm_options = slurm_options or SlurmOptions()
        slurm.check(slurm_options)
        start = partial(start, options=slurm_options)
    elif launcher == "multi_gpu":
        required_gpus()  # before anything is written
    jobs = make_jobs(spec, data_dir)
    _inspect(spec, data_dir)
    directory = SweepDirectory(output_dir, data_dir)
    if break_lock:
        _break_locks(directory, jobs)
    directory.register(jobs)
    standings = _standings(directory, must_answer=launcher == "slurm")
    states = directory.states(jobs, standings)
    folders = directory.job_dirs(jobs)
    in_queue = {job for job in jobs if (standing := standings.get(folders[job].name)) and standing.queued}
    to_launch = [job for job, state in states.items() if state is not State.DONE and job not in in_queue]
    print(summary(states.values()))
    if left := [job for job in in_queue if states[job] is not State.DONE]:
        print(f"{len(left)} jobs are in SLURM's queue and left to it.")
    print(f"About to launch {len(to_launch)} jobs.", flush=True)
    if ask and to_launch and launcher != "dummy" and not _confirmed():
        return 0
    tasks = []
    for job in to_launch:
        places = {"skip_model_save": spec.skip_model_save, "cache_dir": cache_dir}
        tasks.append(Task(job, job.settings(data_dir, folders[job], **places)))
    if slots is None:
        slots = _chosen_slots(jobs, is_told=bool(tasks) and launcher in ("local", "multi_gpu"))
    outcome = start(tasks, directory, slots)
    print(summary(directory.states(jobs, _standings(directory)).values()))
    return _told(outcome)


def _inspect(spec: SweepSpec, data_dir: str | None) -> None:
    """Warns of what a user should know before hours are spent. Raises UserError where data sets have no files."""
    for dataset in spec.datasets:
        get_dataset_class(dataset).check_files(data_dir)
        if differences := get_dataset_class(dataset).differences(data_dir):
            warn(not_as_published(dataset, differences))
        for line in get_dataset_class(dataset).inspect(data_dir)[1]:
            print(line, file=sys.stderr)
    for name, algorithms in drawn_compression(spec).items():
        warn(
            f"hparam {name!r} is drawn for {', '.join(dict.fromkeys(algorithms))}: such a row mixes networks "
            f"that are not compressed alike; to compare at one {name} give it, as in {{name: {algorithms[0]}, "
            f"hparams: {{{name}: ...}}}}"
        )


def _told(outcome: Outcome) -> int:
    """Says how a launch has ended; its exit status."""
    if outcome.interrupted:
        print("Interrupted; the same command continues where it was.")
        return 130
    for job, reason in outcome.failures:
        print(f"failed: {job.describe()}: {reason.strip().splitlines()[-1].strip()}", file=sys.stderr)
    return 1 if outcome.failures else 0


def holds_a_sweep(output_dir: str) -> bool:
    """Whether something was launched into the directory, or into folders in it."""
    root = Path(output_dir)
    return root.is_dir() and bool(read_manifests(root) or runs_below(root))


def status(spec: SweepSpec | None, data_dir: str | None, output_dir: str, *, watch: float | None = None) -> int:
    """Prints every job's state, and their numbers; with `watch`, shows a table anew every so many seconds. Without a
    spec the jobs are those launched so far.

    A watch ends, with status 0 when all jobs are done and 1 otherwise, when nothing waits or runs any more.
    """
    directory = SweepDirectory(output_dir, data_dir)
    jobs = make_jobs(spec, data_dir) if spec else directory.listed()
    if not spec and not jobs:
        raise UserError(
            f"--output_dir {output_dir} holds no sweep; {named(runs_below(directory.path))}: give one of them"
        )
    if watch is not None:
        return Watch(directory, jobs, watch).run()
    if not directory.path.is_dir():
        warn(f"--output_dir {output_dir}: there is no such folder yet")
    standings = _standings(directory)
    states = directory.states(jobs, standings)
    folders, packed = directory.job_dirs(jobs), packed_runs(directory.path)
    for job, state in states.items():
        reason = failure_reason(folders[job], standings) if state is State.FAILED else None
        if state is State.RUNNING and (found := locks.holder(folders[job] / LOCK)) and found.host:
            reason = f"by its lock {found.describe()}"
        if folders[job].name in packed:
            reason = f"packed in {packed[folders[job].name].path}"
        print(f"{state.value}: {folders[job]} {job.describe()}" + (f": {reason}" if reason else ""))
    if copied := several_sweeps(read_manifests(directory.path)):
        print(copied)
    print(summary(states.values()))
    return 0


def delete_incomplete(
    spec: SweepSpec, data_dir: str | None, output_dir: str, *, ask: bool = True, break_lock: bool = False
) -> int:
    """Removes the folders of jobs that have begun and are neither done nor running nor in SLURM's queue."""
    directory = SweepDirectory(output_dir, data_dir)
    jobs = make_jobs(spec, data_dir)
    if break_lock:
        _break_locks(directory, jobs)
    states = directory.states(jobs, _standings(directory, must_answer=True))
    unfinished = [job for job in jobs if states[job] in (State.INCOMPLETE, State.FAILED)]
    print(summary(states.values()))
    leftovers = directory.leftovers(unfinished)
    for one in leftovers:
        print(f"{states[one.job].value}: {one.folder} {one.job.describe()}: {amount([one])}")
    print(f"About to delete {len(unfinished)} jobs: {amount(leftovers)}.", flush=True)
    if ask and unfinished:
        if not sys.stdin.isatty():
            raise UserError("deleting without a terminal to ask on needs --skip_confirmation")
        if not _confirmed():
            return 0
    deleted = directory.delete(leftovers)
    print(f"Deleted {len(deleted)} jobs!" + (f" ({amount(deleted)})" if deleted else ""))
    if kept := len(leftovers) - len(deleted):
        print(f"Kept {kept} that run, are done by now or cannot be removed.")
    return 0


def _chosen_slots(jobs: Sequence[Job], is_told: bool) -> int:
    """What `--jobs auto` stands for here."""
    cores, gpus = usable_cores(), visible_gpus()
    slots = choose_slots(jobs, cores, usable_memory(), gpus)
    if is_told:
        threads = job_environment(0, slots.jobs, gpus)["OMP_NUM_THREADS"]
        each = f"{threads} thread{'s' * (threads != '1')}"
        print(f"--jobs auto: {slots.jobs} at a time, each with {each} ({slots.why}).", flush=True)
    return slots.jobs


def _break_locks(directory: SweepDirectory, jobs: Sequence[Job]) -> None:
    for broken in directory.break_locks(jobs):
        warn(f"removed the lock {broken.describe()}")


def _standings(directory: SweepDirectory, *, must_answer: bool = False) -> dict[str, Standing]:
    """What SLURM has of the sweep; where it cannot be asked and need not, a warning, and nothing."""
    try:
        return slurm_batches.look(directory.path)
    except QueueUnreachable as error:
        if must_answer:
            raise
        warn(f"{error}; states are from disk alone")
        return {}


def _confirmed() -> bool:
    """Asks on a terminal, as DomainBed does; a script that launches means it."""
    if not sys.stdin.isatty():
        return True
    with suppress(EOFError):  # Ctrl-D says no
        if input("Are you sure? (y/n) ").lower().strip().startswith("y"):
            return True
    print("Nevermind!")
    return False
