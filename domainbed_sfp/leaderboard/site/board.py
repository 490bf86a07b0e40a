"""The leaderboard before anything is drawn: which entries are ranked together, in what order, and what was before.

Entries are ranked together where the data set (and its data, where the name does not determine them), the selection
rule, the track and the tier agree and both, or neither, saw unlabelled images of the test environment. Tiers are ranked
apart, the highest first, so that nothing that was checked less stands above what was checked more. Self-reported
entries are listed behind all of these and without ranks: nobody has checked them. Everything in a ranking is measured:
numbers that are only published have no entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from domainbed_sfp.algorithms import registry
from domainbed_sfp.analysis.rows import FP32_BITOPS
from domainbed_sfp.analysis.selection import RULES, Rule
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.documents.entry import Entry, EntryCell, Result
from domainbed_sfp.leaderboard.documents.entry_schema import TRACKS
from domainbed_sfp.leaderboard.tiers import SELF_REPORTED, TIERS

# Of algorithms that no installed package registers.
UNREGISTERED = "not registered"

DENSE, UNKNOWN = "none removed", "not recorded"
# Upper bounds of sparsity, exclusive. They lie between the usual targets (30, 50, 70, 90, 95, 98 %), because removing
# whole channels meets a target only about.
BANDS = {
    "up to 40 %": 0.4,
    "40 to 60 %": 0.6,
    "60 to 80 %": 0.8,
    "80 to 93 %": 0.93,
    "93 % and more": float("inf"),
}


@dataclass(frozen=True)
class Line:
    """An entry under one selection rule. `rank` is None without an average, and of a self-reported entry; `before`
    holds the entries that it replaced, the latest first."""

    rank: int | None
    entry: Entry
    result: Result
    family: str
    before: tuple[Entry, ...]

    @property
    def band(self) -> str:
        """Its band of sparsity."""
        return band_of(self.result.costs.get("sparsity"))

    @property
    def bitops(self) -> float | None:
        """BitOPs of a training image; of a network that is not quantized, its MACs in single precision."""
        costs = self.result.costs
        return costs.get("bitops", FP32_BITOPS * costs["macs"] if "macs" in costs else None)

    @property
    def source_of_bitops(self) -> str:
        """The cost that `bitops` comes from."""
        return "bitops" if "bitops" in self.result.costs else "macs"

    def cell(self, environment: str) -> EntryCell | None:
        """The result on an environment, where it was tested."""
        return next((cell for cell in self.result.cells if cell and cell.environment == environment), None)


@dataclass(frozen=True)
class Ranking:
    """Lines that compete with each other, the best first; of self-reported entries, which do not, by name."""

    dataset: str
    data_digest: str | None
    rule: Rule
    track: str
    transductive: bool
    tier: str
    environments: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def is_verified(self) -> bool:
        """Whether anything was checked, so that there are ranks."""
        return self.tier != SELF_REPORTED

    @property
    def track_title(self) -> str:
        """The track, whether the methods are transductive, and the tier."""
        kind = ", transductive methods" if self.transductive else ""
        return f"{self.track} track{kind}, {self.tier}" + ("" if self.is_verified else " (not ranked)")

    @property
    def tested(self) -> tuple[str, ...]:
        """The environments that are tested, where no line has tested all of them and there is no average to show."""
        if any(line.result.average for line in self.lines):
            return ()
        return tuple(name for name in self.environments if any(line.cell(name) for line in self.lines))

    @property
    def title(self) -> str:
        """What is ranked, in one line."""
        data = f" (data {self.data_digest})" if self.data_digest else ""
        return f"{self.dataset}{data}, {self.track_title}, model selection: {self.rule.title}"


@dataclass(frozen=True)
class Board:
    """All rankings, and all entries: current ones in `entries`, replaced ones in `history`."""

    rankings: tuple[Ranking, ...]
    entries: tuple[Entry, ...]
    history: tuple[Entry, ...]

    @property
    def orphans(self) -> tuple[Entry, ...]:
        """Replaced entries whose current one is not there."""
        current = {(entry.dataset, entry.name) for entry in self.entries}
        return tuple(entry for entry in self.history if (entry.dataset, entry.name) not in current)


def board_of(found: Sequence[Entry]) -> Board:
    """The board of entries, as `store.read_all(folder, history=True)` gives them.

    Raises UserError where two current entries have one name on a data set.
    """
    current = [entry for entry in found if entry.superseded_by is None]
    for (dataset, name), count in Counter((entry.dataset, entry.name) for entry in current).items():
        if count > 1:
            raise UserError(
                f"{count} current entries are called {name!r} on {dataset}; expected one: the others need "
                "`superseded_by`"
            )
    history = tuple(entry for entry in found if entry.superseded_by is not None)
    rankings = []
    for dataset, digest in sorted({(entry.dataset, _digest(entry) or "") for entry in current}):
        here = [entry for entry in current if (entry.dataset, _digest(entry) or "") == (dataset, digest)]
        for rule, transductive, track, tier in product(RULES, (False, True), TRACKS, TIERS[::-1]):
            kind = (track, transductive, tier)
            ranked = [
                entry
                for entry in here
                if rule.key in entry.results and (entry.track, entry.transductive, entry.tier) == kind
            ]
            if ranked:
                lines = tuple(_lines(ranked, rule, history))
                rankings.append(Ranking(dataset, digest or None, rule, *kind, _environments(lines), lines))
    rankings.sort(key=lambda ranking: not ranking.is_verified)
    return Board(tuple(rankings), tuple(current), history)


def band_of(sparsity: float | None) -> str:
    """The band of a sparsity, a fraction."""
    if not sparsity:
        return UNKNOWN if sparsity is None else DENSE
    return next(name for name, bound in BANDS.items() if sparsity < bound)


def family_of(algorithm: str) -> str:
    """An algorithm's family in the registry."""
    return registry.get(algorithm).family if algorithm in registry.names() else UNREGISTERED


def _lines(ranked: Sequence[Entry], rule: Rule, history: Sequence[Entry]) -> list[Line]:
    """By average, as rounded for readers: equal ones share a rank; those that have none come last."""
    averages = {
        entry.name: -1.0 if entry.tier == SELF_REPORTED else _average(entry.results[rule.key]) for entry in ranked
    }
    lines = []
    for entry in sorted(ranked, key=lambda entry: (-averages[entry.name], entry.name)):
        own = averages[entry.name]
        rank = 1 + sum(other > own for other in averages.values()) if own >= 0 else None
        before = [old for old in history if (old.dataset, old.name) == (entry.dataset, entry.name)]
        before.sort(key=lambda old: old.date, reverse=True)
        lines.append(Line(rank, entry, entry.results[rule.key], family_of(entry.algorithm), tuple(before)))
    return lines


def _environments(lines: Sequence[Line]) -> tuple[str, ...]:
    """All environments of the lines, in the order of the data set."""
    names = [name for line in lines for name in line.entry.protocol["environments"]]
    names += [cell.environment for line in lines for cell in line.result.cells if cell]
    return tuple(dict.fromkeys(names))


def _average(result: Result) -> float:
    return -1.0 if result.average is None else round(result.average[0], 1)


def _digest(entry: Entry) -> str | None:
    return entry.protocol["data_digest"]
