"""A row of a table: what its runs reached, chosen by a rule, and what the chosen networks cost.

Accuracies are percent. Standard errors are sample standard deviations (ddof=1) over trials, divided by the root of
their number; None with a single trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from domainbed_sfp.analysis.account import JobKey
from domainbed_sfp.analysis.methods import Method
from domainbed_sfp.analysis.published import PublishedRow
from domainbed_sfp.analysis.selection import Choice, Rule, choose
from domainbed_sfp.runs.records import COST_FIELDS, Run

RECONSTRUCTION = "reconstruction"
# What marks a reconstruction's name.
DAGGER = "†"
# BitOPs of a multiply-accumulate in single precision.
FP32_BITOPS = 32 * 32


@dataclass(frozen=True, slots=True)
class Cell:
    """Mean over `trials` trials, in percent. `choices` (by trial seed) is empty for means of other cells;
    `trials` is None for published numbers."""

    accuracy: float
    std_err: float | None
    trials: int | None
    choices: tuple[tuple[int, Choice], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """`cells` has one entry per environment, None where no run allows one. `average` and `worst` need all of
    them. `in_domain`: the chosen checkpoints on the held-out parts of the environments they were trained on, mean over
    them, trials and test environments, in percent; a network that does well only where an attribute turns round shows
    there.

    `costs` are means over the chosen checkpoints, by the names of COST_FIELDS. `searched`: the hparams that differ
    between its runs, whether chosen or not. `published` is set for rows that come from a publication: the rest was
    measured.
    """

    label: str
    algorithm: str
    settings: dict[str, str]
    standing: str | None
    cells: tuple[Cell | None, ...]
    average: Cell | None
    worst: int | None
    in_domain: float | None
    costs: dict[str, float]
    searched: tuple[str, ...] = ()
    published: PublishedRow | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A column of a table whose runs hold out several environments: the one tested, and all that were held out."""

    env: int
    test_envs: tuple[int, ...]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard error (ddof=1), None for fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    return mean, float(np.std(values, ddof=1)) / math.sqrt(len(values))


def average_of(cells: Sequence[Cell | None]) -> Cell | None:
    """The mean of all cells; its error is over the trials that have every environment."""
    if any(cell is None for cell in cells):
        return None
    whole = [cell for cell in cells if cell is not None]
    by_trial: dict[int, list[float]] = {}
    for cell in whole:
        for trial, choice in cell.choices:
            by_trial.setdefault(trial, []).append(100 * choice.test)
    per_trial = [float(np.mean(values)) for values in by_trial.values() if len(values) == len(cells)]
    error = mean_and_error(per_trial)[1] if per_trial else None
    return Cell(float(np.mean([cell.accuracy for cell in whole])), error, len(per_trial))


def measured_row(
    label: str, method: Method, rule: Rule, runs: dict[JobKey, Run], columns: Iterable[int | Source]
) -> Row:
    """The row of a method: a cell for each environment, or for each of a table of sources."""
    mine = [(job, run) for job, run in runs.items() if job.method == method]
    cells = tuple(_cell(mine, rule, column) for column in columns)
    own = [run for _, run in mine]
    standing = standing_of(run.facts.get("standing") for run in own)
    settings = dict(method.settings)
    return summed_up(
        Row(label, method.algorithm, settings, standing, cells, None, None, None, {}, _searched(own)), range(len(cells))
    )


def summed_up(row: Row, tested: Sequence[int]) -> Row:
    """The row with what follows from its cells. The average and the worst cell are over the columns `tested`."""
    choices = [choice for cell in row.cells if cell for _, choice in cell.choices]
    return replace(
        row,
        average=average_of([row.cells[column] for column in tested]),
        worst=worst_of(row.cells, tested),
        in_domain=100 * float(np.mean([choice.in_domain for choice in choices])) if choices else None,
        costs=_costs(choices),
    )


def _cell(runs: list[tuple[JobKey, Run]], rule: Rule, column: int | Source) -> Cell | None:
    by_trial: dict[int, list[Run]] = {}
    env = column.env if isinstance(column, Source) else column
    for job, run in runs:
        if job.test_envs == column.test_envs if isinstance(column, Source) else env in job.test_envs:
            by_trial.setdefault(job.trial_seed, []).append(run)
    choices = []
    for trial in sorted(by_trial):
        choice = choose(rule, by_trial[trial], env, isinstance(column, Source))
        if choice is not None:
            choices.append((trial, choice))
    if not choices:
        return None
    mean, error = mean_and_error([100 * choice.test for _, choice in choices])
    return Cell(mean, error, len(choices), tuple(choices))


def worst_of(cells: Sequence[Cell | None], columns: Sequence[int]) -> int | None:
    found = {column: cell for column in columns if (cell := cells[column]) is not None}
    if len(found) < len(columns) or not found:
        return None
    return min(found, key=lambda column: found[column].accuracy)


def _costs(choices: list[Choice]) -> dict[str, float]:
    costs = {}
    for name in COST_FIELDS:
        values = [choice.run.costs[name][choice.checkpoint] for choice in choices if name in choice.run.costs]
        values = [value for value in values if not math.isnan(value)]
        if values:
            costs[name] = float(np.mean(values))
    return costs


def _searched(runs: Sequence[Run]) -> tuple[str, ...]:
    names = sorted({name for run in runs for name in run.hparams})
    first = runs[0].hparams if runs else {}
    return tuple(name for name in names if any(run.hparams.get(name) != first.get(name) for run in runs))


def standing_of(standings: Iterable[str | None]) -> str | None:
    """A row is a reconstruction as soon as one of its runs is."""
    named = sorted({standing for standing in standings if standing is not None})
    return RECONSTRUCTION if RECONSTRUCTION in named else next(iter(named), None)
