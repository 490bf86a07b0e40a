"""One job of a sweep: what it computes, and what its folder is called."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any

from domainbed_sfp.core.overrides import overrides_text
from domainbed_sfp.runs.settings import IDENTITY, RunSettings

# The program `domainbed-sfp`, by the interpreter that runs now.
PROGRAM = (sys.executable, "-m", "domainbed_sfp")

# Settings that folders' names leave out where they are the default: there were folders before there were these.
LATER_SETTINGS = {"evaluate": RunSettings.evaluate}


# Ways to write a job's numbers that are looked for on disk: each of eight of them in two ways.
MOST_SPELLINGS = 256


@dataclass(frozen=True, eq=False)
class Job(RunSettings):
    """One run of a sweep: settings that say what it computes. Where its data and results lie is left open.

    hparams: as `hparams.checked_overrides` gives them, so that jobs which say the same are the same.
    """

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and self.name == other.name

    @cached_property
    def name(self) -> str:
        """The job's folder: a hash of all that it computes, later settings only where they are not the default."""
        values = {name: getattr(self, name) for name in IDENTITY}
        for name, default in LATER_SETTINGS.items():
            if values[name] == default:
                del values[name]
        text = json.dumps({**values, "hparams": self.overrides}, sort_keys=True)
        return hashlib.md5(text.encode("utf-8")).hexdigest()

    @cached_property
    def overrides(self) -> dict[str, Any]:
        """The hparams that replace the drawn ones."""
        return json.loads(self.hparams) if self.hparams else {}

    def domainbed_args(self, data_dir: str | None) -> dict[str, Any]:
        """The arguments DomainBed's sweep would give this job."""
        names = ("dataset", "algorithm", "test_envs", "holdout_fraction", "hparams_seed", "task", "trial_seed", "seed")
        args = {name: getattr(self, name) for name in names}
        optional = {name: getattr(self, name) for name in ("steps", "hparams")}
        return {**args, "data_dir": data_dir, **{name: value for name, value in optional.items() if value is not None}}

    def other_names(self, data_dir: str | None) -> list[str]:
        """Folders that may hold this job, too: earlier versions went by how a number was written (8 or 8.0), and
        DomainBed's sweep has a name of its own."""
        spelled = list(_spellings(self))
        names = [job.name for job in spelled]
        # DomainBed's sweep has no flags for these, so its folders hold runs with the defaults.
        ours_alone = ("precision", "checkpoint_freq", "uda_holdout_fraction", "evaluate")
        if all(getattr(self, name) == getattr(RunSettings, name) for name in ours_alone):
            names += [job.domainbed_name(data_dir) for job in spelled]
        return [name for name in dict.fromkeys(names) if name != self.name]

    def domainbed_name(self, data_dir: str | None) -> str:
        """The folder DomainBed's sweep gives this job, which depends on where the data lies."""
        return hashlib.md5(json.dumps(self.domainbed_args(data_dir), sort_keys=True).encode("utf-8")).hexdigest()

    def settings(self, data_dir: str | None, output_dir: Path, **places: Any) -> RunSettings:
        """Of the run, with its places: where data and results lie, and what else `places` says."""
        identity = {name: getattr(self, name) for name in IDENTITY}
        return RunSettings(**identity, data_dir=data_dir, output_dir=str(output_dir), **places)

    def describe(self) -> str:
        """A short line for people."""
        settings = f" {self.hparams}" if self.hparams else ""
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

    choices = [ways(value) for value in job.overrides.values()]
    for values in islice(product(*choices), MOST_SPELLINGS):
        yield replace(job, hparams=overrides_text(dict(zip(job.overrides, values))))


def command_line(args: RunSettings) -> list[str]:
    """The arguments of `domainbed-sfp` that compute `args`; values that are the default are left out."""
    defaults = vars(RunSettings())
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
