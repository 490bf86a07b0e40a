"""The numbers of the good tables, unrounded: rows, cells, averages and what has to be said about them.

Accuracies here are percent. Standard errors are sample standard deviations (ddof=1) over trials, divided by
the root of their number; None with a single trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_sfp.analysis.protocol import Protocol
from domainbed_sfp.analysis.rows import Cell, Row, Source
from domainbed_sfp.analysis.selection import Rule
from domainbed_sfp.core.domainbed_facts import ENVIRONMENTS
from domainbed_sfp.runs.records import Run

# Sparsities (fractions) that differ by no more are equal: channel pruning cannot meet a target to the last weight.
SPARSITY_TOLERANCE = 0.005


@dataclass(frozen=True, slots=True)
class Table:
    """One data set under one selection rule. `planned`: the environments that some job of the sweep holds out.

    Runs that hold out several environments, as in single-source generalization, have a table of their own: its
    "environments" are the pairs of what was tested and what was trained on, one for each of `sources`, and `names` are
    the environments. Both are empty elsewhere. `missing`: how many jobs that it needs are.
    """

    dataset: str
    rule: Rule
    environments: tuple[str, ...]
    rows: tuple[Row, ...]
    protocol: Protocol
    notes: tuple[str, ...]
    planned: frozenset[int]
    missing: int = 0
    sources: tuple[Source, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def measured(self) -> list[Row]:
        """The rows with trials of their own: published ones have none."""
        return [row for row in self.rows if row.published is None]


@dataclass(frozen=True, slots=True)
class AverageRow:
    """The averages of one method on each data set, None where an environment lacks a result, and their
    mean."""

    label: str
    standing: str | None
    cells: tuple[Cell | None, ...]
    mean: float | None


@dataclass(frozen=True, slots=True)
class Averages:
    """Over data sets, under one selection rule: `rows` holds (label, cell per data set, mean of the
    cells). A data set's cell is the average over the environments that the sweep tests; `notes` name them where they
    are not all."""

    rule: Rule
    datasets: tuple[str, ...]
    rows: tuple[AverageRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    tables: tuple[Table, ...]
    averages: tuple[Averages, ...]
    notes: tuple[str, ...]


def one_a_dataset(tables: Sequence[Table]) -> list[Table]:
    """The tables that stand for their data sets where these are compared: that of single test environments, where there
    is one."""
    return list({table.dataset: table for table in reversed(tables)}.values())[::-1]


def tested_environments(table: Table) -> tuple[int, ...]:
    """The environments in which some measured row has a result."""
    return tuple(env for env in range(len(table.environments)) if any(row.cells[env] for row in table.measured))


def environment_names(dataset: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """As the records name them, else as DomainBed does, else env0, env1, ..."""
    count = max(run.in_acc.shape[1] for run in runs)
    for run in runs:
        recorded = run.facts.get("environments")
        if isinstance(recorded, list) and len(recorded) == count:
            return tuple(str(name) for name in recorded)
    known = ENVIRONMENTS.get(dataset, ())
    return known if len(known) == count else tuple(f"env{i}" for i in range(count))


def trained_on(test_envs: Sequence[int], names: Sequence[str]) -> str:
    """What a run with these test environments has learnt from, in words."""
    return f"trained on {'+'.join(name for env, name in enumerate(names) if env not in test_envs)}"


def unlike_settings(tables: Sequence[Table]) -> list[str]:
    """A sentence on the rows that stand for other settings on one data set than on another."""
    said: dict[str, list[str]] = {}
    rows = [(table.dataset, row) for table in tables for row in table.measured]
    for label in dict.fromkeys(row.label for _, row in rows):
        settings = {dataset: row.settings for dataset, row in rows if row.label == label}
        names = {name for values in settings.values() for name in values}
        differing = sorted(name for name in names if len({values.get(name) for values in settings.values()}) > 1)
        if differing:
            each = (
                dataset
                + " "
                + ", ".join(f"{name}={values[name]}" if name in values else f"default {name}" for name in differing)
                for dataset, values in settings.items()
            )
            said.setdefault("; ".join(each), []).append(label)
    return [f"{', '.join(labels)}: not the same settings on all data sets: {each}." for each, labels in said.items()]
