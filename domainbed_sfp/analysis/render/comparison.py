"""Comparisons for readers (as grids) and for programs (CSV and JSON)."""

from __future__ import annotations

import re

from domainbed_sfp.analysis.comparison import (
    AcrossDatasets,
    ComparisonReport,
    Summary,
    TableComparison,
)
from domainbed_sfp.analysis.equal_compression import BEST, BEST_RULE
from domainbed_sfp.analysis.protocol import MNIST_LIKE, is_dealt_by_seed
from domainbed_sfp.analysis.render.grids import ABSENT, MISSING, RECONSTRUCTION_NOTE, Grid, Shown, daggered
from domainbed_sfp.analysis.render.latex import latex_of
from domainbed_sfp.analysis.render.markdown import markdown_of
from domainbed_sfp.analysis.rows import RECONSTRUCTION
from domainbed_sfp.analysis.significance import CONFIDENCE, RESAMPLES, Interval, PairedTest

_PERCENT = f"{100 * CONFIDENCE:g}%"

_FILE_PAIRS = (
    "The pairs are not independent: trials of one environment share its test images, and runs on different "
    "environments share training data. Intervals and p-values speak of other seeds, less of other environments, "
    "for which they are optimistic."
)
_SOURCE_PAIRS = (
    "The pairs are not independent: each run is tested in several environments. Intervals and p-values are optimistic, "
    "and speak of other seeds, less of other environments."
)
_DEALT_PAIRS = (
    "Each run's seed, which depends on its algorithm, deals the {what} out to the environments and makes their "
    "attributes: rows of different algorithms were not trained and tested on the same images, so pairing them takes "
    "out no variance. Pairs are independent but for the {what} all are drawn from."
)


def markdown_comparison(report: ComparisonReport) -> str:
    return markdown_of(comparison_grids(report), report.notes)


def latex_comparison(report: ComparisonReport) -> str:
    return latex_of(comparison_grids(report), report.notes)


def comparison_grids(report: ComparisonReport) -> list[Grid]:
    """A table for each data set and rule, and one over data sets where there are several."""
    grids = []
    for rule in dict.fromkeys(table.table.rule for table in report.tables):
        grids += [_table_grid(table) for table in report.tables if table.table.rule is rule]
        grids += [_across_grid(across, _standings(report)) for across in report.across if across.rule is rule]
    return grids


def _standings(report: ComparisonReport) -> dict[str, str | None]:
    """By label; a row is a reconstruction as soon as it is one on some data set."""
    standings: dict[str, str | None] = {}
    for table in report.tables:
        for summary in (table.row, *(one.other for one in table.comparisons)):
            if standings.get(summary.label) != RECONSTRUCTION:
                standings[summary.label] = summary.standing
    return standings


def _table_grid(table: TableComparison) -> Grid:
    label = daggered(table.row.label, table.row.standing)
    header = (
        "Algorithm",
        "Average",
        f"{_PERCENT} bootstrap",
        "Difference",
        f"{_PERCENT} interval",
        "Pairs",
        "Won/tied/lost",
        "p (t)",
        "p (Holm)",
        "p (Wilcoxon)",
    )
    rows = [(label, *_shown_summary(table.row), *[ABSENT] * (len(header) - 3))]
    for one in table.comparisons:
        name = daggered(one.other.label, one.other.standing) + (f" [{BEST}]" if one.is_best else "")
        rows.append(
            (
                name,
                *_shown_summary(one.other),
                *_shown_difference(one.test),
                _p(one.test.p_t),
                _p(one.p_t_holm),
                _p(one.test.p_wilcoxon),
            )
        )
    return Grid(
        re.sub("[^A-Za-z0-9-]", "-", f"comparison-{table.table.dataset}-{table.table.rule.key}"),
        f"{table.table.dataset}, {table.row.label} compared, model selection: {table.table.rule.title}",
        header,
        tuple(tuple(Shown(text) for text in row) for row in rows),
        table.table.protocol.line(),
        tuple(table_notes(table)),
    )


def _pairs_note(dataset: str) -> str:
    if not is_dealt_by_seed(dataset):
        return _FILE_PAIRS
    return _DEALT_PAIRS.format(what="digits" if dataset in MNIST_LIKE else "images")


def table_notes(table: TableComparison) -> list[str]:
    tests = [one.test for one in table.comparisons]
    count = sum(test.p_t is not None for test in tests)
    shared = "training environments, test environment" if table.table.sources else "test environment"
    notes = [
        f"Average: over the test environments {', '.join(table.environments)}, percent ± standard error over trials "
        f"(sample standard deviation / sqrt(n)). {_PERCENT} bootstrap: percentile interval of {RESAMPLES:,} resamples "
        "of the trials within each environment; the environments are not resampled. With fewer than ten trials it is "
        "too narrow.",
        f"Difference: {table.row.label} minus the row, percentage points, mean over pairs; a pair is two runs with the "
        f"same {shared} and trial seed. {_PERCENT} interval: Student's t, not corrected for several rows.",
        "p (t): two-sided paired t-test, the primary test, because few trials leave a Wilcoxon test no p that is small "
        f"(at best 2/2^n of n pairs). p (Holm): the same, corrected for {count} test{'' if count == 1 else 's'}. "
        "p (Wilcoxon): two-sided signed-rank test, exact, equal pairs dropped, not corrected.",
        _SOURCE_PAIRS if table.table.sources else _pairs_note(table.table.dataset),
    ]
    summaries = [table.row, *(one.other for one in table.comparisons)]
    if any(summary.average is None for summary in summaries):
        notes.append(f"{MISSING}: no result in some tested environment. No average is taken over fewer environments.")
    if any(summary.interval is None for summary in summaries):
        notes.append(f"{ABSENT} in place of a bootstrap interval: an environment has fewer than two trials.")
    if any(summary.standing == RECONSTRUCTION for summary in summaries):
        notes.append(RECONSTRUCTION_NOTE)
    return [*notes, *table.notes, *table.table.notes]


def _across_grid(across: AcrossDatasets, standings: dict[str, str | None]) -> Grid:
    ranks = dict(zip(across.ranked, across.ranking.mean_ranks)) if across.ranking else {}
    header = (
        "Algorithm",
        "Difference",
        "Data sets",
        "Won/tied/lost",
        "p (Wilcoxon)",
        "p (Holm)",
        "Mean rank",
    )
    rank = {label: f"{value:.2f}" for label, value in ranks.items()}
    own = daggered(across.label, standings[across.label])
    rows = [(own, *[ABSENT] * 5, rank.get(across.label, ABSENT))]
    for name, test, p_holm in across.tests:
        difference, _, pairs, record = _shown_difference(test)
        label = daggered(name, standings.get(name))
        if name == BEST and name not in standings:
            label = f"{BEST} at equal compression"
        rows.append((label, difference, pairs, record, _p(test.p_wilcoxon), _p(p_holm), rank.get(name, ABSENT)))
    notes = [
        f"Difference: {across.label} minus the row, percentage points, mean over data sets of averages' difference. "
        f"p (Wilcoxon): two-sided signed-rank test over data sets, exact; p (Holm): corrected for {len(across.tests)} "
        f"row{'' if len(across.tests) == 1 else 's'}.",
        *across.notes,
    ]
    if any(standings.get(name) == RECONSTRUCTION for name in (across.label, *(name for name, _, _ in across.tests))):
        notes.append(RECONSTRUCTION_NOTE)
    if any(name == BEST for name, _, _ in across.tests):
        notes.append(
            f"{BEST}: per data set {BEST_RULE}, named under each table; chosen by test accuracy, which favours it."
        )
    return Grid(
        f"comparison-datasets-{across.rule.key}",
        f"{across.label} compared over data sets ({', '.join(across.datasets)}), model selection: {across.rule.title}",
        header,
        tuple(tuple(Shown(text) for text in row) for row in rows),
        "",
        tuple(notes),
    )


def _shown_summary(summary: Summary) -> tuple[str, str]:
    if summary.average is None:
        return MISSING, MISSING
    error = summary.average.std_err
    average = f"{summary.average.accuracy:.1f} ± {ABSENT if error is None else format(error, '.1f')}"
    return average, _interval(summary.interval, signed=False)


def _shown_difference(test: PairedTest) -> tuple[str, str, str, str]:
    return (
        ABSENT if test.difference is None else f"{test.difference:+.1f}",
        _interval(test.interval, signed=True),
        str(test.pairs),
        f"{test.won}/{test.tied}/{test.lost}",
    )


def _interval(interval: Interval | None, *, signed: bool) -> str:
    if interval is None:
        return ABSENT
    sign = "+" if signed else ""
    return f"{interval.low:{sign}.1f} to {interval.high:{sign}.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "<0.001" if value < 0.001 else f"{value:.3f}"
