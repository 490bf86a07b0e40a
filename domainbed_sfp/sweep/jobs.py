"""Jobs of a sweep and their states, which are read from disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from domainbed_sfp import environment, records, registry
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.errors import UserError
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.slurm_batches import Standing
from domainbed_sfp.training import LOCK, TrainArgs

MANIFEST_FORMAT = 1

# The program `domainbed-sfp`, by the interpreter that runs now.
PROGRAM = (sys.executable, "-m", "domainbed_sfp")

# Settings that jobs of earlier versions did not have, by their defaults: with these a job keeps its folder, and a sweep
# its protocol.
LATER_SETTINGS = {"evaluate": "all"}

# What all runs of one directory must share, so that one table can hold them.
PROTOCOL = ("task", "holdout_fraction", "uda_holdout_fraction", "steps", "checkpoint_freq", "precision", "evaluate")


# Ways to write a job's numbers that are looked for on disk: each of eight of them in two ways.
MOST_SPELLINGS = 256


class State(Enum):
    """Where a job stands. The first three values are DomainBed's words."""

    NOT_LAUNCHED = "Not launched"
    INCOMPLETE = "Incomplete"
    DONE = "Done"
    RUNNING = "Running"
    PENDING = "Pending"
    FAILED = "Failed"


@dataclass(frozen=True)
class Job:
    """One run, described by what it computes and not by where data or results lie.

    hparams: as `hparams.checked_overrides` gives them, so that jobs which say the same are the same.
    """

    dataset: str
    algorithm: str
    test_envs: tuple[int, ...]
    holdout_fraction: float
    hparams_seed: int
    task: str
    trial_seed: int
    seed: int
    uda_holdout_fraction: float = 0.0
    steps: int | None = None
    checkpoint_freq: int | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    evaluate: str = LATER_SETTINGS["evaluate"]

    def __hash__(self) -> int:  # the generated one would hash `hparams`, a dict
        return hash(self.name)

    @cached_property
    def name(self) -> str:
        """The job's folder: a hash of everything above, later settings only where they are not the default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, default in LATER_SETTINGS.items():
            if values[name] == default:
                del values[name]
        text = json.dumps({**values, "hparams": dict(self.hparams)}, sort_keys=True)
        return hashlib.md5(text.encode("utf-8")).hexdigest()

    @property
    def hparams_text(self) -> str | None:
        """The overrides as `--hparams` text; None where there are none."""
        return json.dumps(dict(self.hparams), sort_keys=True) if self.hparams else None

    def domainbed_args(self, data_dir: str | None) -> dict[str, Any]:
        """The arguments DomainBed's sweep would give this job."""
        args: dict[str, Any] = {
            "dataset": self.dataset,
            "algorithm": self.algorithm,
            "test_envs": list(self.test_envs),
            "holdout_fraction": self.holdout_fraction,
            "hparams_seed": self.hparams_seed,
            "data_dir": data_dir,
            "task": self.task,
            "trial_seed": self.trial_seed,
            "seed": self.seed,
        }
        if self.steps is not None:
            args["steps"] = self.steps
        if self.hparams_text is not None:
            args["hparams"] = self.hparams_text
        return args

    def other_names(self, data_dir: str | None) -> list[str]:
        """Folders that may hold this job, too: earlier versions went by how a number was written (8 or 8.0), and
        DomainBed's sweep has a name of its own."""
        spelled = list(_spellings(self))
        names = [job.name for job in spelled]
        # DomainBed's sweep has no flags for these, so its folders hold runs with the defaults.
        ours_alone = ("precision", "checkpoint_freq", "uda_holdout_fraction", "evaluate")
        if all(getattr(self, name) == getattr(Job, name) for name in ours_alone):
            names += [job.domainbed_name(data_dir) for job in spelled]
        return [name for name in dict.fromkeys(names) if name != self.name]

    def domainbed_name(self, data_dir: str | None) -> str:
        """The folder DomainBed's sweep gives this job, which depends on where the data lies."""
        return hashlib.md5(json.dumps(self.domainbed_args(data_dir), sort_keys=True).encode("utf-8")).hexdigest()

    def train_args(self, data_dir: str | None, output_dir: Path, **options: Any) -> TrainArgs:
        """The arguments of our train; `options` are those that do not belong to the job's identity."""
        return TrainArgs(
            data_dir=data_dir,
            dataset=self.dataset,
            algorithm=self.algorithm,
            task=self.task,
            hparams=self.hparams_text,
            hparams_seed=self.hparams_seed,
            trial_seed=self.trial_seed,
            seed=self.seed,
            steps=self.steps,
            checkpoint_freq=self.checkpoint_freq,
            test_envs=list(self.test_envs),
            output_dir=str(output_dir),
            holdout_fraction=self.holdout_fraction,
            uda_holdout_fraction=self.uda_holdout_fraction,
            precision=self.precision,
            evaluate=self.evaluate,
            **options,
        )

    def describe(self) -> str:
        """A short line for people."""
        settings = f" {self.hparams_text}" if self.hparams else ""
        return (
            f"{self.dataset} {self.algorithm} test {','.join(map(str, self.test_envs))} "
            f"hparams {self.hparams_seed} trial {self.trial_seed}{settings}"
        )


def _spellings(job: Job) -> Iterator[Job]:
    """The job with each whole number written as a whole number or as a float; as it is first."""

    def ways(value: Any) -> list[Any]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 2**53 or value != int(value):
            return [value]
        return [value, float(value) if isinstance(value, int) else int(value)]

    choices = [ways(value) for value in job.hparams.values()]
    fractions = ways(job.uda_holdout_fraction)
    for fraction, *values in islice(product(fractions, *choices), MOST_SPELLINGS):
        yield replace(job, uda_holdout_fraction=fraction, hparams=dict(zip(job.hparams, values)))


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


def command_line(args: TrainArgs) -> list[str]:
    """The arguments of `domainbed-sfp` that compute `args`; values that are the default are left out."""
    defaults = vars(TrainArgs())
    command = ["train"]
    for name, value in sorted(vars(args).items()):
        if value == defaults[name] and name != "test_envs":
            continue
        if isinstance(value, bool):
            command.append(f"--{name}")
        elif isinstance(value, list):
            command += [f"--{name}", *map(str, value)]
        else:
            command += [f"--{name}", str(value)]
    return command


class SweepDirectory:
    """A sweep's output directory: where its jobs lie and what state they are in."""

    def __init__(self, path: str | Path, data_dir: str | None = None) -> None:
        self.path = Path(path)
        self.data_dir = data_dir
        self._other_names: dict[Job, list[str]] = {}

    def job_dir(self, job: Job) -> Path:
        """The job's folder; another name of it is honoured where an earlier version or DomainBed has begun the job."""
        return self._job_dir(job, lambda name: (self.path / name).is_dir())

    def job_dirs(self, jobs: Sequence[Job]) -> dict[Job, Path]:
        """The folder of each job, by one look at the directory instead of one or two a job."""
        present = self._folders()
        return {job: self._job_dir(job, present.__contains__) for job in jobs}

    def state(self, job: Job) -> State:
        """The job's state, from what is on disk and who holds its lock."""
        folder = self.job_dir(job)
        return self._state(folder) if folder.is_dir() else State.NOT_LAUNCHED

    def states(self, jobs: Sequence[Job], standings: Mapping[str, Standing] | None = None) -> dict[Job, State]:
        """The state of each job; `standings`, from `slurm_batches.look`, adds what SLURM's queue says.

        `standings` must be older than the disk is looked at, as it is when made before this call: a job that has left
        the queue by then has also left its last word on disk.
        """
        present = self._folders()
        standings = standings or {}
        states = {}
        for job in jobs:
            folder = self._job_dir(job, present.__contains__)
            state = self._state(folder) if folder.name in present else State.NOT_LAUNCHED
            standing = standings.get(folder.name)
            if standing and state is not State.DONE:
                if standing.queued:
                    state = State.RUNNING if standing.queued.is_running else State.PENDING
                elif standing.death and state is not State.RUNNING:
                    state = State.FAILED
            states[job] = state
        return states

    def _folders(self) -> set[str]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name for entry in entries if entry.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _job_dir(self, job: Job, is_there: Callable[[str], bool]) -> Path:
        if not is_there(job.name):
            if job not in self._other_names:
                self._other_names[job] = job.other_names(self.data_dir)
            for name in self._other_names[job]:
                if is_there(name):
                    return self.path / name
        return self.path / job.name

    def _state(self, folder: Path) -> State:
        """The state of a job whose folder is there."""
        if records.is_done(folder):
            return State.DONE
        if is_locked(folder / LOCK):
            return State.RUNNING
        return State.FAILED if (folder / records.FAILURE).exists() else State.INCOMPLETE

    def register(self, jobs: Sequence[Job]) -> None:
        """Notes the jobs in sweep.json, so that tables can name what is missing.

        A directory can grow (more algorithms, trials, hparams), but all its runs share one protocol. Raises UserError
        if it holds runs of another one, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / "sweep.lock", timeout=60):
                manifest = self._manifest()
                protocol = {name: getattr(jobs[0], name) for name in PROTOCOL}
                for dataset in dict.fromkeys(job.dataset for job in jobs):
                    digest = get_dataset_class(dataset).data_digest(self.data_dir)
                    protocol[f"data of {dataset}"] = digest or records.PUBLISHED
                for algorithm in dict.fromkeys(job.algorithm for job in jobs):
                    # One row is one method: a package that has changed since is another.
                    if code := environment.code_of(registry.get(algorithm).cls):
                        protocol[f"code of {algorithm}"] = code
                for weights in dict.fromkeys(job.hparams.get("weights") for job in jobs):
                    if digest := environment.weights_digest(weights):
                        protocol[f"weights {weights}"] = digest
                earlier = {**LATER_SETTINGS, **manifest["protocol"]} if manifest else {}
                for name in protocol.keys() & earlier.keys():
                    if protocol[name] != earlier[name]:
                        raise UserError(
                            f"output_dir {str(self.path)!r} holds another sweep ({name} {earlier[name]!r} there, "
                            f"{protocol[name]!r} here); choose another --output_dir"
                        )
                protocol = {**earlier, **protocol}
                known = {entry["name"]: entry for entry in manifest.get("jobs", [])}
                for job, folder in self.job_dirs(jobs).items():
                    known[folder.name] = {
                        "name": folder.name,
                        "dataset": job.dataset,
                        "algorithm": job.algorithm,
                        "test_envs": list(job.test_envs),
                        "hparams_seed": job.hparams_seed,
                        "trial_seed": job.trial_seed,
                        "seed": job.seed,
                        "steps": job.steps,
                        "hparams": dict(job.hparams),
                    }
                manifest = {"format": MANIFEST_FORMAT, "protocol": protocol, "jobs": list(known.values())}
                records.write_atomically(
                    self.path / records.SWEEP, json.dumps(manifest, indent=1, sort_keys=True) + "\n"
                )
        except Timeout:
            raise UserError(f"output_dir {str(self.path)!r}: another launch has held sweep.lock for a minute") from None
        except OSError as error:
            raise UserError(f"output_dir {str(self.path)!r} cannot be written: {error.strerror or error}") from error

    def listed(self) -> list[Job]:
        """The jobs of all launches so far; none where nothing was launched."""
        manifest = self._manifest()
        protocol = (
            {name: manifest["protocol"].get(name, LATER_SETTINGS.get(name)) for name in PROTOCOL} if manifest else {}
        )
        names = {one.name for one in fields(Job)}
        jobs = []
        for entry in manifest.get("jobs", []):
            values = {**protocol, **{name: value for name, value in entry.items() if name in names - {"name"}}}
            try:
                jobs.append(Job(**{**values, "test_envs": tuple(values["test_envs"])}))
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{str(self.path / records.SWEEP)!r} describes a job not as this version does ({error})"
                ) from None
        return jobs

    def leftovers(self, jobs: Iterable[Job]) -> list[Leftover]:
        """What there is of jobs that have begun; `jobs` are neither done nor running."""
        found = []
        for job in jobs:
            folder = self.job_dir(job)
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
                with FileLock(one.folder / LOCK, timeout=0):
                    if (one.folder / records.DONE).exists() and records.last_record(one.folder):
                        continue
                    shutil.rmtree(one.folder)
            except Timeout:
                continue
            except OSError as error:
                print(f"warning: {one.folder} stays: {error.strerror or error}", file=sys.stderr)
                continue
            deleted.append(one)
        slurm_batches.forget(self.path, {one.folder.name for one in deleted})
        return deleted

    def _manifest(self) -> dict[str, Any]:
        file = self.path / records.SWEEP
        if not file.exists():
            return {}
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(manifest["protocol"], dict):
                raise TypeError("protocol is not an object")
            manifest["jobs"] = [dict(entry, name=entry["name"]) for entry in manifest["jobs"]]
            return manifest
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{str(file)!r} is not a list of jobs ({error}); remove it, the next launch writes it anew"
            ) from None


def failure_reason(folder: Path, standings: Mapping[str, Standing]) -> str | None:
    """Why the job of a folder failed: as its run says, or as SLURM's last task of it ended."""
    standing = standings.get(folder.name)
    return records.load_failure(folder) or (standing.death.how if standing and standing.death else None)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False  # a read-only copy of a sweep: nobody computes there
    lock.release()
    return False
