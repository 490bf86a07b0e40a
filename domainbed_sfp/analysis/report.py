"""A report: the tables of every data set under every selection rule, and the averages over data sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from domainbed_sfp.analysis.account import Account, JobKey, explain_missing
from domainbed_sfp.analysis.methods import Method, algorithm_order, label_methods
from domainbed_sfp.analysis.protocol import protocol_of
from domainbed_sfp.analysis.published import PublishedRow, matching_rows
from domainbed_sfp.analysis.rows import Cell, Row, Source, average_of, measured_row, standing_of, worst_of
from domainbed_sfp.analysis.selection import Rule
from domainbed_sfp.analysis.tables import (
    SPARSITY_TOLERANCE,
    AverageRow,
    Averages,
    Report,
    Table,
    environment_names,
    one_a_dataset,
    trained_on,
    unlike_settings,
)
from domainbed_sfp.core.domainbed_facts import DATASETS
from domainbed_sfp.runs.records import SPARSITY_ASKED, Run


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
        of_rule: list[Table] = []
        for dataset in datasets:
            runs = {job: run for job, run in account.runs.items() if job.dataset == dataset}
            missing = {job: reason for job, reason in account.missing.items() if job.dataset == dataset}
            of_rule += _tables(dataset, rule, labels[dataset], runs, missing, published, notes)
        if len(compared := one_a_dataset(of_rule)) > 1:
            averages.append(_averages(rule, compared))
        tables += of_rule
    return Report(tuple(tables), tuple(averages), tuple(dict.fromkeys(notes)))


def _tables(
    dataset: str,
    rule: Rule,
    labels: dict[Method, str],
    runs: dict[JobKey, Run],
    missing: dict[JobKey, str],
    published: Sequence[PublishedRow] | None,
    notes: list[str],
) -> Iterator[Table]:
    """The tables of a data set under a rule: of runs with one test environment, and of those with several."""
    if not runs:
        notes.append(f"{dataset}: no table, none of its {len(missing)} jobs can be used.")
        return
    counts = {len(job.test_envs) for job in [*runs, *missing]}
    if rule.needs_pairs and not {1, 2} <= counts:
        needed = "one test environment beside those with two" if 2 in counts else "two test environments"
        notes.append(f"{dataset}: no table for {rule.title}, which needs runs with {needed}; this sweep has none.")
        return
    held_out = {env for job in [*runs, *missing] for env in job.test_envs}
    # Pairs beside single environments serve leave-one-domain-out selection; what else holds out several environments is
    # a grid of its own.
    most = 2 if 1 in counts else 0

    def part(is_several: bool) -> tuple[dict[JobKey, Run], dict[JobKey, str]]:
        chosen = {job for job in [*runs, *missing] if (len(job.test_envs) > most) == is_several}
        return (
            {job: run for job, run in runs.items() if job in chosen},
            {job: reason for job, reason in missing.items() if job in chosen},
        )

    for is_several in (False, True):
        own, lacking = part(is_several)
        if own and is_several:
            if rule.choose_alike:
                yield _table_of_sources(dataset, rule, labels, own, lacking, published)
        elif own:
            yield _table(dataset, rule, labels, own, lacking, held_out, published)
        elif lacking:
            what = "several test environments" if is_several else "one test environment"
            notes.append(f"{dataset}: none of its {len(lacking)} jobs with {what} can be used.")


def _table(
    dataset: str,
    rule: Rule,
    labels: dict[Method, str],
    runs: dict[JobKey, Run],
    missing: dict[JobKey, str],
    held_out: Collection[int],
    published: Sequence[PublishedRow] | None,
) -> Table:
    """The table of runs with one test environment, and of pairs where the rule needs them. `held_out`: the environments
    that any job of the sweep holds out, alone or among others."""
    environments = environment_names(dataset, list(runs.values()))
    expected, columns = _expected_rows(labels, runs, missing), range(len(environments))
    rows = [measured_row(label, method, rule, runs, columns) for method, label in labels.items() if label in expected]
    relevant = {job: why for job, why in missing.items() if rule.needs_pairs or len(job.test_envs) == 1}
    protocol = protocol_of(runs, rule)
    notes = (
        protocol.warnings()
        + explain_missing(relevant, labels, environments)
        + _uneven_sparsity(rows)
        + _several_codes(runs, labels)
    )
    planned = frozenset(job.test_envs[0] for job in [*runs, *missing] if len(job.test_envs) == 1)
    for is_among_others, words in ((True, "holds out {} alone"), (False, "has {} as its test environment")):
        left_out = [
            name for env, name in enumerate(environments) if env not in planned and (env in held_out) == is_among_others
        ]
        if left_out:
            told = words.format(" or ".join(left_out))
            notes.append(f"No job of this sweep {told}; no average is taken over fewer environments.")
    if published is not None:
        matching, said = matching_rows(published, dataset, rule, protocol, environments)
        rows += [_published_row(row) for row in matching]
        notes += said
    return Table(dataset, rule, environments, tuple(rows), protocol, tuple(notes), planned, len(relevant))


def _table_of_sources(
    dataset: str,
    rule: Rule,
    labels: dict[Method, str],
    runs: dict[JobKey, Run],
    missing: dict[JobKey, str],
    published: Sequence[PublishedRow] | None,
) -> Table:
    """The table of runs that hold out several environments: a column for each set of them and each one in it."""
    names = environment_names(dataset, list(runs.values()))
    held_out = {job.test_envs for job in [*runs, *missing]}
    sources = [Source(env, envs) for envs in sorted(held_out, key=_trained_on(names)) for env in envs]
    columns = tuple(f"{names[one.env]} ({trained_on(one.test_envs, names)})" for one in sources)
    expected = _expected_rows(labels, runs, missing)
    rows = [measured_row(label, method, rule, runs, sources) for method, label in labels.items() if label in expected]
    protocol = protocol_of(runs, rule)
    notes = (
        protocol.warnings()
        + explain_missing(missing, labels, names)
        + _uneven_sparsity(rows)
        + _several_codes(runs, labels)
    )
    if published is not None:
        notes.append("No published rows: they hold out one environment.")
    planned = frozenset(range(len(columns)))
    return Table(
        dataset, rule, columns, tuple(rows), protocol, tuple(notes), planned, len(missing), tuple(sources), names
    )


def _trained_on(names: Sequence[str]) -> Callable[[Sequence[int]], tuple[int, list[int]]]:
    """Sorts sets of test environments by what is left to train on: few first."""

    def key(test_envs: Sequence[int]) -> tuple[int, list[int]]:
        left = [env for env in range(len(names)) if env not in test_envs]
        return len(left), left

    return key


def _expected_rows(labels: Mapping[Method, str], runs: Iterable[JobKey], missing: Iterable[JobKey]) -> set[str]:
    """The rows that a table of these jobs has."""
    return {labels[job.method] for job in [*runs, *missing]}


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


def _several_codes(runs: Mapping[JobKey, Run], labels: Mapping[Method, str]) -> list[str]:
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
    return Row(
        row.algorithm,
        row.algorithm,
        {},
        "published",
        cells,
        average,
        worst_of(cells, range(len(cells))),
        None,
        {},
        (),
        row,
    )


def _averages(rule: Rule, tables: Sequence[Table]) -> Averages:
    rows: dict[str, list[Row]] = {}
    for row in (row for table in tables for row in table.measured):
        rows.setdefault(row.label, []).append(row)
    by_dataset = {
        (row.label, table.dataset): average_of([row.cells[env] for env in sorted(table.planned)])
        for table in tables
        for row in table.measured
        if table.planned
    }
    notes = [
        f"{table.dataset}: over {', '.join(table.environments[env] for env in sorted(table.planned))} alone, which is "
        "what the sweep tests."
        for table in tables
        if 0 < len(table.planned) < len(table.environments)
    ]
    notes += [
        f"{table.dataset}: over all pairs of what was trained on and another environment that was tested."
        for table in tables
        if table.sources
    ]
    notes += unlike_settings(tables)
    datasets = tuple(table.dataset for table in tables)
    averaged = []
    for label, of_label in sorted(rows.items(), key=lambda item: algorithm_order(item[1][0].algorithm)):
        cells = tuple(by_dataset.get((label, dataset)) for dataset in datasets)
        known = [cell.accuracy for cell in cells if cell is not None]
        mean = float(np.mean(known)) if len(known) == len(cells) else None
        averaged.append(AverageRow(label, standing_of(row.standing for row in of_label), cells, mean))
    return Averages(rule, datasets, tuple(averaged), tuple(notes))
