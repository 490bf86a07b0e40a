"""Tables of runs that hold out several environments, as in single-source generalization, turned: their rows by what was
trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from domainbed_sfp.analysis.rows import Cell, Row, average_of, summed_up
from domainbed_sfp.analysis.tables import Table, trained_on


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of all methods that were trained on the same. Their cells have one entry per environment of the data
    set, None for those trained on; `test_envs` are the others."""

    test_envs: tuple[int, ...]
    rows: tuple[Row, ...]


def by_source(table: Table) -> list[Group]:
    """The rows of a table with `sources`, a group for each set of environments that was trained on; then, if there are
    several, one of their means."""
    sets = list(dict.fromkeys(source.test_envs for source in table.sources))
    groups = []
    for test_envs in sets:
        rows = []
        for row in table.rows:
            cells: list[Cell | None] = [None] * len(table.names)
            for source, cell in zip(table.sources, row.cells):
                if source.test_envs == test_envs:
                    cells[source.env] = cell
            label = f"{row.label}, {trained_on(test_envs, table.names)}"
            rows.append(summed_up(replace(row, label=label, cells=tuple(cells)), test_envs))
        groups.append(Group(test_envs, tuple(rows)))
    if len(sets) > 1:
        tested = tuple(sorted({env for test_envs in sets for env in test_envs}))
        groups.append(Group(tested, tuple(_mean(table, row, tested, len(sets)) for row in table.rows)))
    return groups


def _mean(table: Table, row: Row, tested: Sequence[int], sets: int) -> Row:
    """A method's accuracies in each environment, over all that it was trained on instead."""
    cells: list[Cell | None] = [None] * len(table.names)
    for env in tested:
        cells[env] = average_of([cell for source, cell in zip(table.sources, row.cells) if source.env == env])
    worst = summed_up(replace(row, cells=tuple(cells)), tested).worst
    return replace(row, label=f"{row.label}, mean of the {sets} above", cells=tuple(cells), worst=worst)
