"""One job of a sweep: what it computes, and what its folder is called."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any

from domainbed_sfp.training.train import TrainArgs

# The program `domainbed-sfp`, by the interpreter that runs now.
PROGRAM = (sys.executable, "-m", "domainbed_sfp")

# Settings that jobs of earlier versions did not have, by their defaults: with these a job keeps its folder, and a sweep
# its protocol.
LATER_SETTINGS = {"evaluate": "all"}

# What all runs of one directory must share, so that one table can hold them.
PROTOCOL = ("task", "holdout_fraction", "uda_holdout_fraction", "steps", "checkpoint_freq", "precision", "evaluate")


# Ways to write a job's numbers that are looked for on disk: each of eight of them in two ways.
MOST_SPELLINGS = 256


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
