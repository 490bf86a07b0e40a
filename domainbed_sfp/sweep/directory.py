"""Jobs of a sweep and their states, which are read from disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core import locks, provenance
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError, spelled
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.runs import records
from domainbed_sfp.runs.layout import DONE, FAILURE, LOCK
from domainbed_sfp.runs.manifests import jobs_of, read_manifests, write_manifest
from domainbed_sfp.runs.packed import packed_runs
from domainbed_sfp.runs.settings import PROTOCOL, known_settings
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.job import LATER_SETTINGS, Job
from domainbed_sfp.sweep.slurm_batches import Standing

SWEEP_LOCK = "sweep.lock"
WAY_ON = "go on with --break_lock"


class State(Enum):
    """Where a job stands. The first three values are DomainBed's words."""

    NOT_LAUNCHED = "Not launched"
    INCOMPLETE = "Incomplete"
    DONE = "Done"
    RUNNING = "Running"
    PENDING = "Pending"
    FAILED = "Failed"


@dataclass(frozen=True)
class Leftover:
    """What an unfinished job has left. runs: 0 where it has no folder, because SLURM has lost it before, else 1. steps:
    as its records or its checkpoint show. size: of all files, in bytes."""

    job: Job
    folder: Path
    runs: int
    steps: int
    size: int


def amount(leftovers: Sequence[Leftover]) -> str:
    """How much that is together, in words."""
    runs, steps = sum(one.runs for one in leftovers), sum(one.steps for one in leftovers)
    return (
        f"{runs:,} run{'' if runs == 1 else 's'}, {steps:,} step{'' if steps == 1 else 's'}, "
        f"{sum(one.size for one in leftovers) / 1e6:,.1f} MB"
    )


class SweepDirectory:
    """A sweep's output directory: where its jobs lie and what state they are in."""

    def __init__(self, path: str | Path, data_dir: str | None = None) -> None:
        self.path = Path(path)
        self.data_dir = data_dir
        self._other_names: dict[Job, list[str]] = {}

    def job_dir(self, job: Job) -> Path:
        """The job's folder, which a packed run has no more; another name of it is honoured where an earlier version or
        DomainBed has begun the job."""
        return self.job_dirs([job])[job]

    def job_dirs(self, jobs: Sequence[Job]) -> dict[Job, Path]:
        """The folder of each job, by one look at the directory instead of one or two a job."""
        present = self._folders()
        return {job: self._job_dir(job, present) for job in jobs}

    def state(self, job: Job) -> State:
        """The job's state, from what is on disk and who holds its lock."""
        return self.states([job])[job]

    def states(self, jobs: Sequence[Job], standings: Mapping[str, Standing] | None = None) -> dict[Job, State]:
        """The state of each job; `standings`, from `slurm_batches.look`, adds what SLURM's queue says.

        `standings` must be older than the disk is looked at, as it is when made before this call: a job that has left
        the queue by then has also left its last word on disk.
        """
        present, packed = self._folders(), packed_runs(self.path)
        standings = standings or {}
        states = {}
        for job in jobs:
            folder = self._job_dir(job, present)
            state = State.NOT_LAUNCHED
            if folder.name in present:
                state = State.DONE if folder.name in packed else self._state(folder)
            standing = standings.get(folder.name)
            if standing and state is not State.DONE:
                if standing.queued:
                    state = State.RUNNING if standing.queued.is_running else State.PENDING
                elif standing.death and state is not State.RUNNING:
                    state = State.FAILED
            states[job] = state
        return states

    def _folders(self) -> set[str]:
        """The folders of runs, and those that packed runs had."""
        try:
            with os.scandir(self.path) as entries:
                folders = {entry.name for entry in entries if entry.is_dir()}
            return folders | packed_runs(self.path, folders).keys()
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _job_dir(self, job: Job, present: Container[str]) -> Path:
        if job.name not in present:
            if job not in self._other_names:
                self._other_names[job] = job.other_names(self.data_dir)
            for name in self._other_names[job]:
                if name in present:
                    return self.path / name
        return self.path / job.name

    def _state(self, folder: Path) -> State:
        """The state of a job whose folder is there."""
        if records.is_done(folder):
            return State.DONE
        if locks.is_held(folder / LOCK):
            return State.RUNNING
        return State.FAILED if (folder / FAILURE).exists() else State.INCOMPLETE

    def register(self, jobs: Sequence[Job]) -> None:
        """Notes the jobs in sweep.json, so that tables can name what is missing.

        A directory can grow (more algorithms, trials, hparams), but all its runs share one protocol. Raises UserError
        if it holds runs of another one, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with locks.hold(self.path / SWEEP_LOCK, 60, "launching this sweep", WAY_ON):
                manifests = read_manifests(self.path)
                shared = self._shared(jobs)
                for manifest in reversed(manifests):
                    earlier = {**LATER_SETTINGS, **manifest.protocol}
                    for name in shared.keys() & earlier.keys():
                        if shared[name] != earlier[name]:
                            there, here = earlier[name], shared[name]
                            raise UserError(
                                f"output_dir {str(self.path)!r} holds another sweep ({name} {spelled(there, [here])} "
                                f"there, {spelled(here, [there])} here); choose another --output_dir"
                            )
                    shared = {**earlier, **shared}
                write_manifest(self.path, shared, self._entries(jobs, jobs_of(manifests)))
        except OSError as error:
            raise UserError(f"output_dir {str(self.path)!r} cannot be written: {error.strerror or error}") from error

    def _shared(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """What the runs of a directory share, by name: settings, data, code and weights."""
        shared = {name: getattr(jobs[0], name) for name in PROTOCOL}
        for dataset in dict.fromkeys(job.dataset for job in jobs):
            digest = get_dataset_class(dataset).data_digest(self.data_dir)
            shared[f"data of {dataset}"] = digest or records.PUBLISHED
        for algorithm in dict.fromkeys(job.algorithm for job in jobs):
            # One row is one method: a package that has changed since is another.
            if code := provenance.code_of(registry.get(algorithm).cls):
                shared[f"code of {algorithm}"] = code
        for weights in dict.fromkeys(job.overrides.get("weights") for job in jobs):
            if digest := provenance.weights_digest(weights):
                shared[f"weights {weights}"] = digest
        return shared

    def _entries(self, jobs: Sequence[Job], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What a manifest says of the jobs known so far and of `jobs`."""
        entries = {
            folder.name: {
                "name": folder.name,
                "dataset": job.dataset,
                "algorithm": job.algorithm,
                "test_envs": list(job.test_envs),
                "hparams_seed": job.hparams_seed,
                "trial_seed": job.trial_seed,
                "seed": job.seed,
                "steps": job.steps,
                "hparams": job.overrides,
            }
            for job, folder in self.job_dirs(jobs).items()
        }
        # A job that an earlier version has listed under other spellings of its numbers, and that nobody has begun, is
        # one of these.
        present, here = self._folders(), {_values(entry) for entry in entries.values()}
        kept = {entry["name"]: entry for entry in known if entry["name"] in present or _values(entry) not in here}
        return list({**kept, **entries}.values())

    def listed(self) -> list[Job]:
        """The jobs of all launches so far, here and where folders were copied from; none where nothing was launched."""
        jobs: dict[str, Job] = {}
        for manifest in read_manifests(self.path):
            shared = {name: manifest.protocol.get(name, LATER_SETTINGS.get(name)) for name in PROTOCOL}
            for entry in manifest.jobs:
                try:
                    job = Job(**{**shared, **known_settings(entry)})
                except TypeError as error:
                    raise UserError(
                        f"{str(self.path / manifest.file)!r} describes a job not as this version does ({error})"
                    ) from None
                jobs.setdefault(entry["name"], job)
        return list(jobs.values())

    def break_locks(self, jobs: Iterable[Job]) -> list[locks.Holder]:
        """Removes the locks of the sweep and of these jobs that a file alone holds, and returns whose they were."""
        folders = self.job_dirs(list(jobs)).values()
        files = [self.path / SWEEP_LOCK, *(folder / LOCK for folder in folders), slurm_batches.launch_lock(self.path)]
        return list(filter(None, map(locks.break_lock, files)))

    def leftovers(self, jobs: Iterable[Job]) -> list[Leftover]:
        """What there is of jobs that have begun; `jobs` are neither done nor running."""
        found = []
        for job, folder in self.job_dirs(list(jobs)).items():
            step = max(records.last_step(folder) + 1, records.saved_step(folder))
            sizes = [file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()]
            found.append(Leftover(job, folder, int(folder.is_dir()), step, sum(sizes)))
        return found

    def delete(self, leftovers: Iterable[Leftover]) -> list[Leftover]:
        """Removes the folders of runs, each under its lock, and returns those removed: one that has been started or
        finished since stays, as does one whose records cannot be read.

        What SLURM's tasks have left about them goes too: a job that begins anew has all its retries.
        """
        deleted = []
        for one in leftovers:
            if not one.runs:
                deleted.append(one)
                continue
            try:
                with locks.hold(one.folder / LOCK, 0, "computing this run", WAY_ON):
                    if (one.folder / DONE).exists() and records.last_record(one.folder):
                        continue
                    shutil.rmtree(one.folder)
            except locks.Held:
                continue
            except OSError as error:
                warn(f"{one.folder} stays: {error.strerror or error}")
                continue
            deleted.append(one)
        slurm_batches.forget(self.path, {one.folder.name for one in deleted})
        return deleted


def _values(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a manifest's entry says; equal where its numbers are, however they are written."""
    hparams = entry.get("hparams") or {}
    settings = tuple(sorted(hparams.items())) if isinstance(hparams, dict) else hparams
    return (
        *(entry.get(name) for name in ("dataset", "algorithm", "hparams_seed", "trial_seed", "seed", "steps")),
        *entry["test_envs"], settings,
    )  # fmt: skip


def failure_reason(folder: Path, standings: Mapping[str, Standing]) -> str | None:
    """Why the job of a folder failed: as its run says, or as SLURM's last task of it ended."""
    standing = standings.get(folder.name)
    return records.load_failure(folder) or (standing.death.how if standing and standing.death else None)
