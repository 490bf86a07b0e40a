"""What the formats for readers show: the rounded cells, headers and notes of a table, free of any markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from domainbed_sfp.analysis.rows import DAGGER, RECONSTRUCTION, Cell, Row
from domainbed_sfp.analysis.sources import by_source
from domainbed_sfp.analysis.tables import Averages, Report, Table

BEST, SECOND = "best", "second"
MISSING = "X"
ABSENT = "\N{EN DASH}"

RECONSTRUCTION_NOTE = (
    f"{DAGGER} reconstruction: built from the method's description, where paper and code leave gaps; "
    "its numbers are not the paper's."
)


@dataclass(frozen=True, slots=True)
class Shown:
    """A cell's text, and whether it is the best or second of its column."""

    text: str
    emphasis: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table to be drawn. The first column holds row labels; `name` is fit for an anchor; `protocol` may be
    empty."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Shown, ...], ...]
    protocol: str
    notes: tuple[str, ...]


def grids_of(report: Report) -> list[Grid]:
    """Every table of the report and, after those of its rule, the averages over data sets."""
    grids = []
    rules = dict.fromkeys([table.rule for table in report.tables])
    for rule in rules:
        grids += [
            _sources_grid(table) if table.sources else _table_grid(table)
            for table in report.tables
            if table.rule is rule
        ]
        grids += [_averages_grid(averages) for averages in report.averages if averages.rule is rule]
    return grids


def magnitude(number: float) -> str:
    """A count in three digits with a unit: 11_176_512 as "11.2M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        scaled = number / size
        if scaled >= 0.9995:
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{decimals}f}{unit}"
    return f"{number:.0f}"


def daggered(label: str, standing: str | None) -> str:
    """A row's name as readers see it: reconstructions are marked."""
    return f"{label} {DAGGER}" if standing == RECONSTRUCTION else label


def _cost_columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Headers and contents of the costs that some row has."""
    return [
        (header, show)
        for header, needed, show in (
            ("Sparsity", "sparsity", _sparsity),
            ("Parameters left", "surviving_parameters", _parameters),
            ("MACs left", "macs", _macs),
            ("Bits", "mean_bits", _bits),
            ("BitOPs (of 8 bits)", "bitops", _bitops),
        )
        if any(needed in row.costs for row in rows)
    ]


def _table_grid(table: Table) -> Grid:
    cost_columns = _cost_columns(table.rows)
    shown = _shown_environments(table)
    summaries = ("Average", "Worst") if len(shown) == len(table.environments) else ()
    columns = [_cells([row.cells[env] for row in table.rows], table.rows) for env in shown]
    if summaries:
        columns.append(_cells([row.average for row in table.rows], table.rows))
        columns.append(_worst(table.rows, table.environments))
    columns.append([Shown(_in_domain(row)) for row in table.rows])
    columns.append([Shown(_trials(row, shown)) for row in table.rows])
    columns += [[Shown(show(row)) for row in table.rows] for _, show in cost_columns]
    environments = [table.environments[env] for env in shown]
    return Grid(
        re.sub("[^A-Za-z0-9-]", "-", f"{table.dataset}-{table.rule.key}"),
        f"{table.dataset}, model selection: {table.rule.title}",
        ("Algorithm", *environments, *summaries, "In-domain", "Trials", *(name for name, _ in cost_columns)),
        tuple(zip([Shown(_label(row)) for row in table.rows], *columns)),
        table.protocol.line(),
        (*_legend(table), *table.notes),
    )


def _sources_grid(table: Table) -> Grid:
    """The table of runs that hold out several environments: a row for each method and each set of environments that it
    was trained on. The best is marked among rows that were trained on the same."""
    groups = by_source(table)
    rows = [row for group in groups for row in group.rows]
    cost_columns = _cost_columns(rows)
    tested = sorted({env for group in groups for env in group.test_envs})
    lines: list[tuple[Shown, ...]] = []
    for group in groups:
        columns = [[Shown(_label(row)) for row in group.rows]]
        for env in tested:
            was_held_out = env in group.test_envs
            cells = _cells([row.cells[env] for row in group.rows], group.rows)
            columns.append(cells if was_held_out else [Shown(ABSENT) for _ in group.rows])
        columns.append(_cells([row.average for row in group.rows], group.rows))
        columns.append(_worst(group.rows, table.names))
        columns.append([Shown(_in_domain(row)) for row in group.rows])
        columns.append([Shown(_trials(row, group.test_envs)) for row in group.rows])
        columns += [[Shown(show(row)) for row in group.rows] for _, show in cost_columns]
        lines += zip(*columns)
    environments = [table.names[env] for env in tested]
    return Grid(
        re.sub("[^A-Za-z0-9-]", "-", f"{table.dataset}-{table.rule.key}-sources"),
        f"{table.dataset}, by what was trained on, model selection: {table.rule.title}",
        ("Algorithm", *environments, "Average", "Worst", "In-domain", "Trials", *(name for name, _ in cost_columns)),
        tuple(lines),
        table.protocol.line(),
        (
            f"{ABSENT} in place of an accuracy: trained on. Average and Worst are over the other environments.",
            *_legend(table),
            *table.notes,
        ),
    )


def _worst(rows: Sequence[Row], environments: Sequence[str]) -> list[Shown]:
    """The column of the lowest accuracies, with the environments they are of."""
    lowest = [None if row.worst is None else row.cells[row.worst] for row in rows]
    return [
        Shown(f"{one.text} ({environments[row.worst]})", one.emphasis) if row.worst is not None else one
        for one, row in zip(_cells(lowest, rows, error=False), rows)
    ]


def _shown_environments(table: Table) -> list[int]:
    """Those that the sweep tests; all of them where published rows have results in others."""
    shown = [
        env
        for env in range(len(table.environments))
        if env in table.planned or any(row.cells[env] is not None for row in table.rows)
    ]
    return shown or list(range(len(table.environments)))


def _averages_grid(averages: Averages) -> Grid:
    rows = averages.rows
    columns = [_cells([row.cells[at] for row in rows], None) for at in range(len(averages.datasets))]
    means = [None if row.mean is None else Cell(row.mean, None, None) for row in rows]
    columns.append(_cells(means, None, error=False))
    labels = [Shown(daggered(row.label, row.standing)) for row in rows]
    notes = ["The protocol and the missing jobs of each data set stand under its own table.", *averages.notes]
    if any(row.mean is None for row in rows):
        notes.append(f"{MISSING}: a test environment of the data set has no result.")
    if any(row.standing == RECONSTRUCTION for row in rows):
        notes.append(RECONSTRUCTION_NOTE)
    return Grid(
        f"averages-{averages.rule.key}",
        f"Averages over data sets, model selection: {averages.rule.title}",
        ("Algorithm", *averages.datasets, "Average"),
        tuple(zip(labels, *columns)),
        "",
        tuple(notes),
    )


def _cells(column: Sequence[Cell | None], rows: Sequence[Row] | None, error: bool = True) -> list[Shown]:
    """One column of accuracies; the best and, of three or more, the second are marked, as rounded."""
    rounded = sorted({round(cell.accuracy, 1) for cell in column if cell is not None}, reverse=True)
    filled = sum(cell is not None for cell in column)
    emphasis = {}
    if filled >= 2:
        emphasis[rounded[0]] = BEST
    if filled >= 3 and len(rounded) >= 2:
        emphasis[rounded[1]] = SECOND
    shown = []
    for position, cell in enumerate(column):
        if cell is None:
            published = rows is not None and rows[position].published is not None
            shown.append(Shown(ABSENT if published else MISSING))
        else:
            text = f"{cell.accuracy:.1f}"
            if error:
                text += f" ± {ABSENT if cell.std_err is None else format(cell.std_err, '.1f')}"
            shown.append(Shown(text, emphasis.get(round(cell.accuracy, 1), "")))
    return shown


def _label(row: Row) -> str:
    if row.published is not None:
        return f"{row.label} [published]"
    return daggered(row.label, row.standing)


def _in_domain(row: Row) -> str:
    if row.in_domain is None:
        return ABSENT if row.published is not None else MISSING
    return f"{row.in_domain:.1f}"


def _trials(row: Row, shown: Sequence[int]) -> str:
    if row.published is not None:
        return ABSENT
    counts = sorted({0 if cell is None else cell.trials or 0 for cell in (row.cells[env] for env in shown)})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def _sparsity(row: Row) -> str:
    return f"{100 * row.costs['sparsity']:.1f}%" if "sparsity" in row.costs else ABSENT


def _parameters(row: Row) -> str:
    return _part(row, "surviving_parameters", "parameters")


def _macs(row: Row) -> str:
    return _part(row, "macs", "dense_macs")


def _bits(row: Row) -> str:
    return f"{row.costs['mean_bits']:.2f}" if "mean_bits" in row.costs else ABSENT


def _bitops(row: Row) -> str:
    return _part(row, "bitops", "bitops_8bit")


def _part(row: Row, left: str, dense: str) -> str:
    if left not in row.costs:
        return ABSENT
    text = magnitude(row.costs[left])
    if row.costs.get(dense):
        text += f" ({100 * row.costs[left] / row.costs[dense]:.0f}%)"
    return text


def _legend(table: Table) -> list[str]:
    cells = [row.cells[env] for row in table.measured for env in _shown_environments(table)]
    notes = ["Accuracy in percent ± standard error over trials (sample standard deviation / sqrt(n))."]
    if any(row.in_domain is not None for row in table.measured):
        notes.append("In-domain: the chosen networks on the held-out parts of the environments they were trained on.")
    if len(table.protocol.hparams_seeds) > 1:
        notes.append("`collect --chosen` lists the hparams behind each number.")
    if any(cell is not None and cell.std_err is None for cell in cells):
        notes.append(f"{ABSENT} in place of a standard error: n=1, a single trial has none.")
    if any(cell is None for cell in cells):
        why = "the jobs it needs are missing" if table.missing else "no job of this sweep gives one"
        notes.append(f"{MISSING}: no result, {why}. No average is taken over fewer environments.")
    if any(row.standing == RECONSTRUCTION for row in table.measured):
        notes.append(RECONSTRUCTION_NOTE)
    sources = dict.fromkeys(row.published.source for row in table.rows if row.published is not None)
    if sources:
        notes.append(
            f"[published]: as printed by {'; '.join(sources)}. DomainBed's own standard errors divide by n, not n-1."
        )
    return notes
