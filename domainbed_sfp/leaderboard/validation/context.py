"""One bundle while it is checked: its files, and what the checks so far have made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from domainbed_sfp.leaderboard.bundle.layout import RECORDS
from domainbed_sfp.leaderboard.bundle.tree import Tree
from domainbed_sfp.leaderboard.documents.problems import Problem
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.networks import Expected, Network, key_of


@dataclass
class Bundle:
    """What checks share. Each is a generator of problems that is run to its end, in the order of `validation.CHECKS`.

    tree: the files. claimed: submission.json, None where it is not one. runs: those whose records can be understood.
    is_whole: no file of records was left out of `runs`. is_excessive: there are so many that they are not read. unfit:
    names of runs whose numbers cannot be put together. document: the submission as recomputed from the records, None
    where they are not fit for it. expected: what the settings of a run say of its records, by its name, where its
    network can be built here; by_settings: the same, by `key_of` a run. unchecked: what could not be checked here.
    unverified: by data set, the costs that the records do not determine.
    """

    tree: Tree
    claimed: dict[str, Any] | None = None
    runs: list[BundleRun] = field(default_factory=list)
    is_whole: bool = True
    is_excessive: bool = False
    unfit: set[str] = field(default_factory=set)
    document: dict[str, Any] | None = None
    expected: dict[str, Expected] = field(default_factory=dict)
    by_settings: dict[str, Expected | None] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    unverified: dict[str, list[str]] = field(default_factory=dict)
    _last: tuple[str, Network] | None = field(default=None, repr=False)

    def cannot(self, what: str) -> None:
        """Notes once what could not be checked."""
        if what not in self.unchecked:
            self.unchecked.append(what)

    def network_of(self, run: BundleRun) -> Network:
        """The run's network built anew, see there for what it raises; the last one is kept."""
        key = key_of(run)
        if self._last is None or self._last[0] != key:
            self._last = None  # two at once would take twice the memory
            self._last = key, Network(run)
        return self._last[1]

    @property
    def is_fit(self) -> bool:
        """Whether numbers can be recomputed: every run can be read, is another job, and belongs to one method."""
        methods = {(run.run.algorithm, run.run.args["hparams"]) for run in self.runs}
        is_unique = len({run.job for run in self.runs}) == len(self.runs)
        return self.is_whole and len(methods) == 1 and is_unique and not self.unfit


Check = Callable[[Bundle], Iterator[Problem]]
RunCheck = Callable[[Bundle, BundleRun], Iterator[Problem]]


def records_of(run: BundleRun) -> str:
    """The file of a run's records, by its name in the bundle."""
    return f"{RECORDS}/{run.name}.jsonl"
