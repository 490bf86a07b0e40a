"""The numbers of the good tables, unrounded: rows, cells, averages and what has to be said about them.

Accuracies here are percent. Standard errors are sample standard deviations (ddof=1) over trials, divided by
the root of their number; None with a single trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..domainbed_facts import DATASETS, ENVIRONMENTS
from ..records import COST_FIELDS, SPARSITY_ASKED, Run
from .jobs import Account, Job, explain_missing
from .methods import Method, algorithm_order, label_methods
from .protocol import Protocol, protocol_of
from .published import PublishedRow, matching_rows
from .selection import Choice, Rule, choose

RECONSTRUCTION = "reconstruction"

# Sparsities (fractions) that differ by no more are equal: channel pruning cannot meet a target to the last weight.
SPARSITY_TOLERANCE = 0.005


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
class Table:
    """One data set under one selection rule. `planned`: the environments that some job of the sweep holds out."""

    dataset: str
    rule: Rule
    environments: tuple[str, ...]
    rows: tuple[Row, ...]
    protocol: Protocol
    notes: tuple[str, ...]
    planned: frozenset[int]


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


def build_report(account: Account, rules: Sequence[Rule], published: Sequence[PublishedRow] | None = None) -> Report:
    """The tables of every data set under every rule, and the averages where there are several data sets.

    A rule that needs pairs of test environments gives no table where a sweep has none; the report says so.
    """
    jobs = [*account.runs, *account.missing]
    present = {job.dataset for job in jobs}
    datasets = [name for name in DATASETS if name in present] + sorted(present - set(DATASETS))
    labels = label_methods((job.dataset, job.method) for job in jobs)
    tables, averages, notes = [], [], list(account.notes)
    for rule in rules:
        of_rule = []
        for dataset in datasets:
            runs = {job: run for job, run in account.runs.items() if job.dataset == dataset}
            missing = {job: reason for job, reason in account.missing.items() if job.dataset == dataset}
            if not runs:
                notes.append(f"{dataset}: no table, none of its {len(missing)} jobs can be used.")
            elif rule.needs_pairs and not any(len(job.test_envs) == 2 for job in [*runs, *missing]):
                notes.append(
                    f"{dataset}: no table for {rule.title}, which needs runs with two test environments; "
                    "this sweep has none."
                )
            else:
                of_rule.append(_table(dataset, rule, labels[dataset], runs, missing, published))
        if len(of_rule) > 1:
            averages.append(_averages(rule, of_rule))
        tables += of_rule
    return Report(tuple(tables), tuple(averages), tuple(dict.fromkeys(notes)))


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


def tested_environments(table: Table) -> tuple[int, ...]:
    """The environments in which some measured row has a result."""
    measured = [row for row in table.rows if row.published is None]
    return tuple(env for env in range(len(table.environments)) if any(row.cells[env] for row in measured))


def environment_names(dataset: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """As the records name them, else as DomainBed does, else env0, env1, ..."""
    count = max(run.in_acc.shape[1] for run in runs)
    for run in runs:
        recorded = run.facts.get("environments")
        if isinstance(recorded, list) and len(recorded) == count:
            return tuple(str(name) for name in recorded)
    known = ENVIRONMENTS.get(dataset, ())
    return known if len(known) == count else tuple(f"env{i}" for i in range(count))


def _table(
    dataset: str,
    rule: Rule,
    labels: dict[Method, str],
    runs: dict[Job, Run],
    missing: dict[Job, str],
    published: Sequence[PublishedRow] | None,
) -> Table:
    environments = environment_names(dataset, list(runs.values()))
    rows = [_row(label, method, rule, runs, len(environments)) for method, label in labels.items()]
    relevant = {job: why for job, why in missing.items() if rule.needs_pairs or len(job.test_envs) == 1}
    protocol = protocol_of(runs, rule)
    notes = (
        protocol.warnings()
        + explain_missing(relevant, labels, environments)
        + _uneven_sparsity(rows)
        + _several_codes(runs, labels)
    )
    planned = frozenset(job.test_envs[0] for job in [*runs, *missing] if len(job.test_envs) == 1)
    left_out = [name for env, name in enumerate(environments) if env not in planned]
    if left_out:
        notes.append(
            f"No job of this sweep has {' or '.join(left_out)} as its test environment; no average is taken over fewer "
            "environments."
        )
    if published is not None:
        matching, said = matching_rows(published, dataset, rule, protocol, environments)
        rows += [_published_row(row) for row in matching]
        notes += said
    return Table(dataset, rule, environments, tuple(rows), protocol, tuple(notes), planned)


def _row(label: str, method: Method, rule: Rule, runs: dict[Job, Run], environments: int) -> Row:
    mine = [(job, run) for job, run in runs.items() if job.method == method]
    cells = tuple(_cell(mine, rule, env) for env in range(environments))
    choices = [choice for cell in cells if cell for _, choice in cell.choices]
    return Row(
        label,
        method.algorithm,
        dict(method.settings),
        _standing(run.facts.get("standing") for _, run in mine),
        cells,
        average_of(cells),
        _worst(cells),
        100 * float(np.mean([choice.in_domain for choice in choices])) if choices else None,
        _costs(choices),
        _searched([run for _, run in mine]),
    )


def _cell(runs: list[tuple[Job, Run]], rule: Rule, env: int) -> Cell | None:
    by_trial: dict[int, list[Run]] = {}
    for job, run in runs:
        if env in job.test_envs:
            by_trial.setdefault(job.trial_seed, []).append(run)
    choices = []
    for trial in sorted(by_trial):
        choice = choose(rule, by_trial[trial], env)
        if choice is not None:
            choices.append((trial, choice))
    if not choices:
        return None
    mean, error = mean_and_error([100 * choice.test for _, choice in choices])
    return Cell(mean, error, len(choices), tuple(choices))


def _worst(cells: Sequence[Cell | None]) -> int | None:
    if any(cell is None for cell in cells):
        return None
    return min(range(len(cells)), key=lambda env: cells[env].accuracy)  # type: ignore[union-attr]


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


def _uneven_sparsity(rows: Sequence[Row]) -> list[str]:
    """A sentence for each row whose chosen networks are not pruned alike, as where sparsity is searched."""
    notes = []
    for row in rows:
        choices = [choice for cell in row.cells if cell for _, choice in cell.choices]
        for choice in choices:
            asked, found = choice.run.hparams.get("sparsity"), choice.run.costs.get("sparsity")
            if asked is None or found is None or choice.run.hparams.get("mask_rule", "top_k") != "top_k":
                continue
            if abs(found[choice.checkpoint] - asked) > SPARSITY_ASKED:
                notes.append(
                    f"Warning: {row.label}: a chosen network has sparsity {100 * found[choice.checkpoint]:.1f}% where "
                    f"hparam sparsity asks for {100 * asked:.1f}%: its checkpoint is not at its final compression."
                )
                break
        values = [
            choice.run.costs["sparsity"][choice.checkpoint] for choice in choices if "sparsity" in choice.run.costs
        ]
        values = [value for value in values if not math.isnan(value)]
        if values and max(values) - min(values) > SPARSITY_TOLERANCE:
            notes.append(
                f"{row.label}: the chosen networks have sparsities from {100 * min(values):.1f}% to "
                f"{100 * max(values):.1f}%; the row's costs are means over them."
            )
    return notes


def _several_codes(runs: Mapping[Job, Run], labels: Mapping[Method, str]) -> list[str]:
    """A sentence for each row whose runs were made by several versions of another package's algorithm."""
    codes: dict[str, set[str]] = {}
    for job, run in runs.items():
        codes.setdefault(labels[job.method], set()).add(str(run.facts.get("code")))
    return [
        f"Warning: {label} mixes runs by {len(found)} versions of its package ({', '.join(sorted(found))})."
        for label, found in codes.items()
        if len(found) > 1
    ]


def _published_row(row: PublishedRow) -> Row:
    cells = tuple(None if one is None else Cell(one[0], one[1], None) for one in row.environments)
    average = None if row.average is None else Cell(row.average[0], row.average[1], None)
    return Row(row.algorithm, row.algorithm, {}, "published", cells, average, _worst(cells), None, {}, (), row)


def _averages(rule: Rule, tables: Sequence[Table]) -> Averages:
    rows: dict[str, list[Row]] = {}
    for row in (row for table in tables for row in table.rows if row.published is None):
        rows.setdefault(row.label, []).append(row)
    by_dataset = {
        (row.label, table.dataset): average_of([row.cells[env] for env in sorted(table.planned)])
        for table in tables
        for row in table.rows
        if row.published is None and table.planned
    }
    notes = [
        f"{table.dataset}: over {', '.join(table.environments[env] for env in sorted(table.planned))} alone, which is "
        "what the sweep tests."
        for table in tables
        if 0 < len(table.planned) < len(table.environments)
    ]
    notes += unlike_settings(tables)
    datasets = tuple(table.dataset for table in tables)
    averaged = []
    for label, of_label in sorted(rows.items(), key=lambda item: algorithm_order(item[1][0].algorithm)):
        cells = tuple(by_dataset.get((label, dataset)) for dataset in datasets)
        known = [cell.accuracy for cell in cells if cell is not None]
        mean = float(np.mean(known)) if len(known) == len(cells) else None
        averaged.append(AverageRow(label, _standing(row.standing for row in of_label), cells, mean))
    return Averages(rule, datasets, tuple(averaged), tuple(notes))


def unlike_settings(tables: Sequence[Table]) -> list[str]:
    """A sentence on the rows that stand for other settings on one data set than on another."""
    said: dict[str, list[str]] = {}
    rows = [(table.dataset, row) for table in tables for row in table.rows if row.published is None]
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


def _standing(standings: Iterable[str | None]) -> str | None:
    """A row is a reconstruction as soon as one of its runs is."""
    named = sorted({standing for standing in standings if standing is not None})
    return RECONSTRUCTION if RECONSTRUCTION in named else next(iter(named), None)
