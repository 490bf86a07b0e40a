"""One row of the tables against others: pairs over environments and trials, and ranks over data sets.

A pair is two runs of one data set with the same test environment and trial seed, so with the same splits, where the
images are files; some sets (protocol.is_dealt_by_seed) are made anew by a run's seed, which depends on its algorithm.
What is compared is what the selection rule chose, as in the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from domainbed_sfp.analysis.account import number_ranges
from domainbed_sfp.analysis.equal_compression import BEST, best_of_equal_compression
from domainbed_sfp.analysis.ranks import rank_rows, ranking_notes
from domainbed_sfp.analysis.rows import DAGGER, Cell, Row, average_of
from domainbed_sfp.analysis.selection import Rule
from domainbed_sfp.analysis.significance import (
    ALPHA,
    Interval,
    PairedTest,
    Ranking,
    bootstrap_interval,
    friedman_nemenyi,
    holm,
    paired_test,
    pairs_text,
    smallest_wilcoxon_p,
)
from domainbed_sfp.analysis.tables import (
    Report,
    Table,
    one_a_dataset,
    tested_environments,
    unlike_settings,
)
from domainbed_sfp.core.errors import UserError, unknown_name


@dataclass(frozen=True, slots=True)
class Summary:
    """A row over the tested environments: mean, sample standard error and bootstrap interval, in percent.

    `average` is None where an environment lacks a result, `interval` also where one has a single trial.
    """

    label: str
    standing: str | None
    average: Cell | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The row compared minus `other`, in percentage points. `asked` are the words of the command line for `other`.

    `unpaired` lists the (environment, trials) of which only one row has a result, by the label of the row that lacks
    it.
    """

    other: Summary
    asked: tuple[str, ...]
    test: PairedTest
    p_t_holm: float | None
    p_wilcoxon_holm: float | None
    unpaired: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def is_best(self) -> bool:
        return BEST in self.asked


@dataclass(frozen=True, slots=True)
class TableComparison:
    """One data set under one rule. `environments` are the tested ones; `table` is where the rows come from."""

    table: Table
    environments: tuple[str, ...]
    row: Summary
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AcrossDatasets:
    """Averages as pairs over data sets: `tests` holds the name of the other row (or BEST), the tests of `label` minus
    it and the Wilcoxon p that Holm adjusts. `ranking`, of the rows `ranked`, is None where they are too few."""

    rule: Rule
    datasets: tuple[str, ...]
    label: str
    tests: tuple[tuple[str, PairedTest, float | None], ...]
    ranked: tuple[str, ...]
    ranking: Ranking | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    tables: tuple[TableComparison, ...]
    across: tuple[AcrossDatasets, ...]
    notes: tuple[str, ...]


def compare(report: Report, names: Sequence[str], exclude: Sequence[str] = ()) -> ComparisonReport:
    """The row names[0] against the rows names[1:], or against every other row where no other is named.

    Rows go by the labels of the tables. BEST stands, per data set, for the best other row that is compressed as far
    (BEST_RULE). `exclude` holds labels or algorithms that neither BEST nor "every other row" may pick. Raises UserError
    for an unknown name, and when no data set allows a comparison.
    """
    names = [_plain(name) for name in names]
    exclude = [_plain(name) for name in exclude]
    _check_names(report, names, exclude)
    subject, others = names[0], list(dict.fromkeys(names[1:]))
    tables: list[TableComparison] = []
    notes: list[str] = []
    for table in report.tables:
        compared = _compare_in(table, subject, others, exclude, notes)
        if compared is not None:
            tables.append(compared)
    if not tables:
        raise UserError(f"--compare {' '.join(names)}: nothing to compare. {' '.join(dict.fromkeys(notes))}")
    across = []
    for rule in dict.fromkeys(table.rule for table in report.tables):
        kept = one_a_dataset([compared.table for compared in tables if compared.table.rule is rule])
        of_rule = [compared for compared in tables if compared.table in kept]
        if len({compared.table.dataset for compared in of_rule}) > 1:
            across.append(_across(rule, of_rule, others))
        elif of_rule:
            notes.append(
                f"{rule.title}: no test over data sets (Friedman, Nemenyi, Wilcoxon), "
                f"{of_rule[0].table.dataset} is the only one compared."
            )
    return ComparisonReport(tuple(tables), tuple(across), tuple(dict.fromkeys([*notes, *report.notes])))


def _plain(name: str) -> str:
    """A row's name without the mark that tables add to reconstructions."""
    return name.removesuffix(DAGGER).rstrip()


def _check_names(report: Report, names: Sequence[str], exclude: Sequence[str]) -> None:
    rows = [row for table in report.tables for row in table.measured]
    labels = list(dict.fromkeys(row.label for row in rows))
    for position, name in enumerate(names):
        if name not in labels and not (name == BEST and position):
            of_algorithm = [label for label in labels if label.startswith(f"{name} (")]
            if of_algorithm:
                raise UserError(f"--compare {name!r} is more than one row; give one of: {'; '.join(of_algorithm)}")
            raise unknown_name("--compare row", name, labels if not position else [*labels, BEST])
    if names[0] in names[1:]:
        raise UserError(f"--compare {names[0]!r} names a row and itself; expected another row, or {BEST!r}")
    algorithms = list(dict.fromkeys(row.algorithm for row in rows))
    for name in exclude:
        if name not in labels and name not in algorithms:
            raise unknown_name("--exclude row", name, dict.fromkeys([*labels, *algorithms]))
        if {row.label for row in rows if name in (row.label, row.algorithm)} == {names[0]}:
            raise UserError(f"--exclude {name!r} is the row that --compare is about; expected others")


def _compare_in(
    table: Table, subject: str, others: Sequence[str], exclude: Sequence[str], notes: list[str]
) -> TableComparison | None:
    """The comparisons of one table; None, and a note why, where it has none."""
    where = f"{table.dataset}, {table.rule.title}"
    rows = {row.label: row for row in table.measured}
    if subject not in rows:
        notes.append(f"{where}: not compared, it has no row {subject}.")
        return None
    row = rows[subject]
    own = []
    excluded = [label for label, one in rows.items() if label in exclude or one.algorithm in exclude]
    excluded = [label for label in excluded if label != subject]
    candidates = [one for label, one in rows.items() if label != subject and label not in excluded]
    if excluded:
        own.append(f"Left out by --exclude: {', '.join(excluded)}.")
    picked: dict[str, list[str]] = {}
    for name in others or [one.label for one in candidates]:
        if name == BEST and name not in rows:
            best, said = best_of_equal_compression(table, row, candidates)
            if best is None:
                notes.append(f"{where}: {said}")
            else:
                own.append(said)
                picked.setdefault(best.label, []).append(BEST)
        elif name in rows:
            picked.setdefault(name, []).append(name)
        else:
            notes.append(f"{where}: no row {name} to compare with.")
    if not picked:
        notes.append(f"{where}: not compared, no other row to compare {subject} with.")
        return None
    tested = tested_environments(table)
    pairs = [_pairs(table, row, rows[label], tested) for label in picked]
    tests = [paired_test(differences) for differences, _ in pairs]
    p_t_holm, p_wilcoxon_holm = holm([test.p_t for test in tests]), holm([test.p_wilcoxon for test in tests])
    comparisons = tuple(
        Comparison(_summary(rows[label], tested), tuple(asked), test, p_t, p_wilcoxon, unpaired)
        for (label, asked), (_, unpaired), test, p_t, p_wilcoxon in zip(
            picked.items(), pairs, tests, p_t_holm, p_wilcoxon_holm
        )
    )
    own += _unpaired_notes(subject, comparisons) + _remark_notes(comparisons)
    environments = tuple(table.environments[env] for env in tested)
    return TableComparison(table, environments, _summary(row, tested), comparisons, tuple(own))


def _accuracies(cell: Cell | None) -> dict[int, float]:
    """Test accuracy in percent by trial seed."""
    return {} if cell is None else {trial: 100 * choice.test for trial, choice in cell.choices}


def _pairs(
    table: Table, row: Row, other: Row, tested: Sequence[int]
) -> tuple[list[float], tuple[tuple[str, str, tuple[int, ...]], ...]]:
    """The differences of all pairs, and (label that lacks it, environment, trials) of what has no partner."""
    differences, unpaired = [], []
    for env in tested:
        mine, theirs = _accuracies(row.cells[env]), _accuracies(other.cells[env])
        differences += [mine[trial] - theirs[trial] for trial in sorted(mine.keys() & theirs.keys())]
        for lacking, trials in ((other.label, mine.keys() - theirs.keys()), (row.label, theirs.keys() - mine.keys())):
            if trials:
                unpaired.append((lacking, table.environments[env], tuple(sorted(trials))))
    return differences, tuple(unpaired)


def _summary(row: Row, tested: Sequence[int]) -> Summary:
    cells = [row.cells[env] for env in tested]
    strata = [list(_accuracies(cell).values()) for cell in cells]
    return Summary(row.label, row.standing, average_of(cells), bootstrap_interval(strata))


def _unpaired_notes(subject: str, comparisons: Sequence[Comparison]) -> list[str]:
    notes = []
    for comparison in comparisons:
        if comparison.unpaired:
            count = sum(len(trials) for _, _, trials in comparison.unpaired)
            listed = "; ".join(
                f"{environment} trial {number_ranges(trials)} (no result of {lacking})"
                for lacking, environment, trials in comparison.unpaired
            )
            notes.append(f"{subject} and {comparison.other.label}: {pairs_text(count)} not formed: {listed}.")
    return notes


def _remark_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What the tests could not do, said once for all rows it is true of."""
    by_remark: dict[str, list[str]] = {}
    for comparison in comparisons:
        for remark in comparison.test.remarks:
            by_remark.setdefault(remark, []).append(comparison.other.label)
    return [f"{_all_or_some(labels, comparisons)}: {remark}." for remark, labels in by_remark.items()]


def _all_or_some(labels: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    return "All rows" if 1 < len(labels) == len(comparisons) else ", ".join(labels)


def _across(rule: Rule, compared: Sequence[TableComparison], others: Sequence[str]) -> AcrossDatasets:
    """Averages over the tested environments of each data set as pairs; ranks of all rows that are compared."""
    subject = compared[0].row.label
    names = list(others) or list(dict.fromkeys(one.other.label for table in compared for one in table.comparisons))
    tests, notes = [], []
    for name in names:
        differences, lacking = [], []
        for table in compared:
            other = next((one.other for one in table.comparisons if name in one.asked), None)
            if other is None or other.average is None or table.row.average is None:
                lacking.append(table.table.dataset)
            else:
                differences.append(table.row.average.accuracy - other.average.accuracy)
        tests.append(paired_test(differences))
        if lacking:
            notes.append(f"{name}: no pair of averages on {', '.join(lacking)}.")
    most = max(test.won + test.lost for test in tests)
    if smallest_wilcoxon_p(most) > ALPHA:
        notes.append(
            f"{most} data set{'' if most == 1 else 's'} with a difference: the smallest p of a Wilcoxon test is "
            f"{smallest_wilcoxon_p(most):.3g}, it cannot reach {ALPHA}."
        )
    p_holm = holm([test.p_wilcoxon for test in tests])
    ranked, scores, left_out = rank_rows([one.table for one in compared], [subject, *names])
    ranking = None
    if left_out:
        notes.append(f"Not ranked, for want of an average on some data set: {', '.join(left_out)}.")
    if len(ranked) >= 3:
        ranking = friedman_nemenyi(scores)
        notes += ranking_notes(ranking)
    else:
        notes.append(f"No Friedman test: it ranks three rows or more, here {len(ranked)}.")
    shown = {subject, *names}
    notes += unlike_settings(
        [replace(one.table, rows=tuple(row for row in one.table.rows if row.label in shown)) for one in compared]
    )
    datasets = tuple(one.table.dataset for one in compared)
    return AcrossDatasets(rule, datasets, subject, tuple(zip(names, tests, p_holm)), ranked, ranking, tuple(notes))
