"""The figures of a report: accuracy against what a network costs, by environment, and by training step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from domainbed_sfp.analysis.render.grids import daggered, magnitude
from domainbed_sfp.analysis.render.html.svg import Line, Look, Point, chart, scatter
from domainbed_sfp.analysis.render.looks import bars_text, short_label
from domainbed_sfp.analysis.rows import FP32_BITOPS, Row, average_of
from domainbed_sfp.analysis.tables import Table, tested_environments
from domainbed_sfp.runs.records import Run

# Cost of a point's place -> (its axis, whether the axis is in percent).
_COSTS = {
    "macs": ("Multiply-accumulates left, of one image", False),
    "bitops": ("Bit operations of one image", False),
    "sparsity": ("Sparsity", True),
}
# Curve -> its axis.
_CURVES = {
    "loss": "Training loss",
    "test": "Accuracy in the test environment (%)",
    "in_domain": "Accuracy in the training environments, held-out parts (%)",
    "sparsity": "Sparsity (%)",
}


@dataclass(frozen=True)
class Figure:
    """`svg` is the drawing, `kind` what a reader chooses it by, `caption` what has to be said."""

    kind: str
    svg: str
    caption: str = ""


def cost_figures(table: Table, looks: Mapping[str, Look]) -> list[Figure]:
    """Average accuracy against each cost that the records know and that differs between rows."""
    tested = tested_environments(table)
    averages = {row.label: average_of([row.cells[env] for env in tested]) for row in table.measured}
    figures = []
    for name, (axis, percent) in _COSTS.items():
        found = []
        for row in table.measured:
            average, cost = averages[row.label], _cost(row, name, table)
            if average is not None and cost is not None:
                found.append((row, cost, average))
        if len({cost for _, cost, _ in found}) < 2:
            continue
        points = [
            Point(
                cost,
                average.accuracy,
                looks[row.label],
                short_label(row.label),
                f"{daggered(short_label(row.label), row.standing)}\n{average.accuracy:.1f}"
                + (f" ± {average.std_err:.1f}" if average.std_err is not None else "")
                + f" %\n{f'sparsity {100 * cost:.1f} %' if percent else f'{magnitude(cost)} {name}'}",
                average.std_err,
                name != "sparsity" and not any(c <= cost and a.accuracy > average.accuracy for _, c, a in found),
            )
            for row, cost, average in found
        ]
        names = ", ".join(table.environments[env] for env in tested)
        caption = f"Mean over the test environments ({names}). {bars_text(table)}."
        if name != "sparsity":
            caption += " The line joins the rows that no other beats in accuracy and cost."
        text = _percent if percent else None
        svg = scatter(points, f"{table.dataset}: accuracy against {name}", axis, "Accuracy (%)", text)
        figures.append(Figure(axis, svg, caption))
    return figures


def environment_figure(table: Table, looks: Mapping[str, Look]) -> Figure | None:
    """Accuracy in each test environment; None where only one is tested, which the cost figures show."""
    tested = tested_environments(table)
    if len(tested) < 2:
        return None
    points = []
    rows = table.measured
    for at, env in enumerate(tested):
        for place, row in enumerate(rows):
            cell = row.cells[env]
            if cell is not None:
                x = at + 0.7 * ((place + 0.5) / len(rows) - 0.5)
                error = f" ± {cell.std_err:.1f}" if cell.std_err is not None else ""
                tip = f"{short_label(row.label)}\n{table.environments[env]}: {cell.accuracy:.1f}{error} %"
                points.append(Point(x, cell.accuracy, looks[row.label], "", tip, cell.std_err))
    names = [table.environments[env] for env in tested]
    svg = scatter(points, f"{table.dataset}: accuracy by environment", "Test environment", "Accuracy (%)", places=names)
    return Figure("Test environment", svg, f"{bars_text(table)}.")


def training_figures(
    runs: Sequence[tuple[str, Run]], losses: Mapping[str, Mapping[int, float]], looks: Mapping[str, Look], dataset: str
) -> list[Figure]:
    """Curves over training, each the mean over a row's runs at every step that all of them recorded.

    Args:
        runs: (row, run) of one data set.
        losses: by run's directory, the loss of each step.
    """
    by_row: dict[str, list[Run]] = defaultdict(list)
    for label, run in runs:
        by_row[label].append(run)
    figures = []
    for name, axis in _CURVES.items():
        lines = []
        for label, of_row in by_row.items():
            points = _mean_curve([_curve(name, run, losses.get(run.directory, {})) for run in of_row])
            if len(points) > 1:
                lines.append(Line(short_label(label), looks[label], points))
        if lines and not (name == "sparsity" and all(y == 0 for line in lines for _, y in line.points)):
            figures.append(Figure(axis, chart(lines, f"{dataset}: {axis}", "Step", axis), "Means over runs."))
    return figures


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def _cost(row: Row, name: str, table: Table) -> float | None:
    if name == "bitops" and not any("bitops" in one.costs for one in table.measured):
        return None
    if name == "bitops" and "bitops" not in row.costs and "macs" in row.costs:
        return row.costs["macs"] * FP32_BITOPS  # not quantized: single precision
    return row.costs.get(name)


def _curve(name: str, run: Run, losses: Mapping[int, float]) -> dict[int, float]:
    if name == "loss":
        return dict(losses)
    if name == "sparsity":
        values = 100 * run.costs.get("sparsity", np.zeros(len(run.steps)))
    elif name == "test":
        values = 100 * run.in_acc[:, list(run.test_envs)].mean(1)
    else:
        training = [env for env in range(run.out_acc.shape[1]) if env not in run.test_envs]
        values = 100 * run.out_acc[:, training].mean(1)
    return {step: float(value) for step, value in zip(run.steps, values) if not math.isnan(value)}


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> list[tuple[float, float]]:
    common = set.intersection(*(set(curve) for curve in curves))
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in sorted(common)]
