"""The numbers of the figures, before anything is drawn: what stands in the CSV file beside a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_sfp.analysis.methods import Method, label_methods
from domainbed_sfp.analysis.ranks import rank_rows, ranking_notes
from domainbed_sfp.analysis.rows import FP32_BITOPS, Cell, average_of
from domainbed_sfp.analysis.significance import Ranking, friedman_nemenyi
from domainbed_sfp.analysis.tables import Report, Table, one_a_dataset, tested_environments
from domainbed_sfp.core.errors import UserError

AVERAGE = "average"


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A row: accuracy and standard error in percent over the tested environments, `cost` in units of `cost_name`.

    single_precision: the records have no BitOPs, because nothing is quantized; `cost` is FP32_BITOPS for each MAC.
    """

    dataset: str
    selection: str
    environments: str
    row: str
    standing: str | None
    cost_name: str
    cost: float
    single_precision: bool
    accuracy: float
    std_err: float | None
    on_front: bool


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A row in one environment, or AVERAGE over the tested ones. `line` names the row without its sparsity."""

    dataset: str
    selection: str
    environment: str
    line: str
    row: str
    standing: str | None
    sparsity: float
    accuracy: float
    std_err: float | None
    trials: int | None


@dataclass(frozen=True, slots=True)
class RankPoint:
    selection: str
    row: str
    standing: str | None
    mean_rank: float
    critical_difference: float
    datasets: str


def front_points(report: Report) -> tuple[list[FrontPoint], list[str]]:
    """Accuracy against surviving MACs, or BitOPs where a record has them; and what had to be left out.

    Raises UserError when no row has both.
    """
    rows = [row for table in report.tables for row in table.measured]
    name = "bitops" if any("bitops" in row.costs for row in rows) else "macs"
    points, said = [], []
    for table in report.tables:
        tested = tested_environments(table)
        found, without_cost, without_average = [], [], []
        for row in table.measured:
            average = average_of([row.cells[env] for env in tested])
            cost = row.costs.get(name)
            single_precision = cost is None and name == "bitops" and "macs" in row.costs
            if single_precision:
                cost = row.costs["macs"] * FP32_BITOPS
            if cost is None:
                without_cost.append(row.label)
            elif average is None:
                without_average.append(row.label)
            else:
                found.append((row, cost, single_precision, average))
        for row, cost, single_precision, average in found:
            beaten = any(_dominates((c, a.accuracy), (cost, average.accuracy)) for _, c, _, a in found)
            points.append(
                FrontPoint(
                    table.dataset,
                    table.rule.key,
                    " ".join(table.environments[env] for env in tested),
                    row.label,
                    row.standing,
                    name,
                    cost,
                    single_precision,
                    average.accuracy,
                    average.std_err,
                    not beaten,
                )
            )
        said += _left_out(table, f"the records do not say their {name}", without_cost)
        said += _left_out(table, "no result in some tested environment", without_average)
    if not points:
        raise UserError(f"--plot fronts: nothing to draw. {' '.join(said)}")
    return points, said


def curve_points(report: Report) -> tuple[list[CurvePoint], list[str]]:
    """Accuracy against sparsity, in every tested environment and their average; and what had to be left out.

    Rows that differ in the hparam `sparsity` alone make one line. Raises UserError when no row has a sparsity.
    """
    points, said = [], []
    for table in report.tables:
        tested = tested_environments(table)
        rows = [row for row in table.measured if "sparsity" in row.costs]
        methods = {
            row.label: Method(row.algorithm, tuple(item for item in row.settings.items() if item[0] != "sparsity"))
            for row in rows
        }
        lines = label_methods((table.dataset, method) for method in methods.values()).get(table.dataset, {})
        columns: list[tuple[str, list[int]]] = [(table.environments[env], [env]) for env in tested]
        if len(tested) > 1:
            columns.append((AVERAGE, list(tested)))
        for environment, envs in columns:
            for row in rows:
                cell = row.cells[envs[0]] if len(envs) == 1 else average_of([row.cells[env] for env in envs])
                if cell is not None:
                    line = lines[methods[row.label]]
                    points.append(_curve_point(table, environment, line, row.label, row.standing, row.costs, cell))
            missing = {row.label for row in rows} - {
                point.row for point in points if (point.dataset, point.environment) == (table.dataset, environment)
            }
            said += _left_out(table, f"no result for {environment}", sorted(missing))
        unknown = [row.label for row in table.measured if "sparsity" not in row.costs]
        said += _left_out(table, "the records do not say their sparsity", unknown)
    if not points:
        raise UserError(f"--plot curves: nothing to draw. {' '.join(said)}")
    return points, said


def rank_points(report: Report) -> tuple[list[RankPoint], Ranking, list[str]]:
    """Mean ranks over data sets, best first, their test, and what has to be said about it.

    Raises UserError for fewer than two data sets or fewer than three rows that all of them have.
    """
    tables = one_a_dataset(report.tables)
    datasets = [table.dataset for table in tables]
    if len(datasets) < 2:
        raise UserError(
            f"--plot cd ranks rows over data sets: it needs two or more, here is one ({datasets[0]}); "
            "--plot fronts or curves draw one"
        )
    ranked, scores, left_out = rank_rows(tables)
    said = [f"not ranked, for want of an average on some data set: {', '.join(left_out)}"] if left_out else []
    if len(ranked) < 3:
        raise UserError(
            f"--plot cd ranks rows that every data set has: it needs three or more, here are {len(ranked)}"
            + "".join(f"; {one}" for one in said)
        )
    ranking = friedman_nemenyi(scores)
    standings = {row.label: row.standing for table in tables for row in table.measured}
    points = [
        RankPoint(
            report.tables[0].rule.key,
            label,
            standings[label],
            rank,
            ranking.critical_difference,
            " ".join(datasets),
        )
        for rank, label in sorted(zip(ranking.mean_ranks, ranked), key=lambda entry: entry[0])
    ]
    return points, ranking, [*said, *ranking_notes(ranking)]


def _curve_point(
    table: Table,
    environment: str,
    line: str,
    label: str,
    standing: str | None,
    costs: dict[str, float],
    cell: Cell,
) -> CurvePoint:
    return CurvePoint(
        table.dataset,
        table.rule.key,
        environment,
        line,
        label,
        standing,
        costs["sparsity"],
        cell.accuracy,
        cell.std_err,
        cell.trials,
    )


def _dominates(one: tuple[float, float], two: tuple[float, float]) -> bool:
    """Whether (cost, accuracy) `one` is no worse than `two` in both and better in one."""
    return one[0] <= two[0] and one[1] >= two[1] and one != two


def _left_out(table: Table, why: str, labels: Sequence[str]) -> list[str]:
    return [f"{table.dataset}: left out, {why}: {', '.join(labels)}."] if labels else []
