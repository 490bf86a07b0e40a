"""Accuracy against sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.figures.panels import (
    ASIDE,
    Looks,
    draw_legend,
    finish,
    panels_of,
    side_by_side,
    wrapped_title,
)
from domainbed_sfp.analysis.figures.points import (
    AVERAGE,
    CurvePoint,
    curve_points,
)
from domainbed_sfp.analysis.tables import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curves(report: Report) -> tuple[Figure, Sequence[Any], list[str]]:
    """Accuracy against sparsity, one panel for every environment of every data set and their average."""
    points, said = curve_points(report)
    looks = Looks((point.line, point.standing) for point in points)
    panels = list(dict.fromkeys((point.dataset, point.environment) for point in points))
    figure, axes = panels_of(len(panels), looks)
    for axis, panel in zip(axes, panels):
        here = [point for point in points if (point.dataset, point.environment) == panel]
        places = side_by_side(
            [100 * point.sparsity for point in here],
            [point.accuracy for point in here],
            [point.std_err for point in here],
            width=100.0,
        )
        lines: dict[str, list[tuple[float, CurvePoint]]] = {}
        for place, point in zip(places, here):
            lines.setdefault(point.line, []).append((place, point))
        for line, of_line in lines.items():
            _curve(axis, sorted(of_line, key=lambda entry: entry[1].sparsity), looks, line)
        axis.set_title(wrapped_title(f"{panel[0]}: {panel[1] if panel[1] != AVERAGE else 'average of environments'}"))
        axis.set_xlabel("Sparsity (%)")
        axis.set_xlim(min(0.0, *places) - 3, max(100.0, *places) + 3)
    finish(
        figure,
        axes,
        report,
        f"Accuracy against sparsity; {ASIDE}",
    )
    draw_legend(figure, looks, looks.names, lines=True)
    return figure, points, said


def _curve(axis: Axes, points: Sequence[tuple[float, CurvePoint]], looks: Looks, line: str) -> None:
    """One line with its error bars through (place on the x axis, point); a dense network's accuracy goes across."""
    look = looks.of(line)
    axis.errorbar(
        [place for place, _ in points],
        [point.accuracy for _, point in points],
        yerr=[0.0 if point.std_err is None else point.std_err for _, point in points],
        linestyle=looks.line_style(line),
        **look,
    )
    if len(points) == 1 and points[0][1].sparsity == 0:
        axis.axhline(points[0][1].accuracy, color=look["color"], linewidth=0.6, linestyle=(0, (1, 2)), zorder=0)
