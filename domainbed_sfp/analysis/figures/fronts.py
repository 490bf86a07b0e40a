"""Pareto fronts: accuracy against cost."""

from __future__ import annotations

import math
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
    front_points,
)
from domainbed_sfp.analysis.render.grids import magnitude
from domainbed_sfp.analysis.render.looks import colour_of
from domainbed_sfp.analysis.tables import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_NAME_LENGTH = 28  # letters of a name beside a point; longer ones go into the legend


def draw_fronts(report: Report) -> tuple[Figure, Sequence[Any], list[str]]:
    """Accuracy against cost, one panel a data set; a line joins the rows that no other beats in both."""
    points, said = front_points(report)
    looks = Looks((point.row, point.standing) for point in points)
    panels = list(dict.fromkeys(point.dataset for point in points))
    figure, axes = panels_of(len(panels), looks, named=True)
    drawn: list[tuple[Axes, list[tuple[float, float, str]]]] = []
    name = {"macs": "surviving MACs", "bitops": "BitOPs"}[points[0].cost_name]
    for axis, dataset in zip(axes, panels):
        here = [point for point in points if point.dataset == dataset]
        front = sorted((point for point in here if point.on_front), key=lambda point: (point.cost, point.accuracy))
        reach = [*(point.cost for point in front), max(point.cost for point in here)]
        axis.plot(
            reach,
            [*(point.accuracy for point in front), front[-1].accuracy],
            drawstyle="steps-post",
            color="0.6",
            linewidth=1.0,
            zorder=1,
        )
        costs = [point.cost for point in here]
        heights = [point.accuracy for point in here], [point.std_err for point in here]
        if min(costs) > 0 and max(costs) / min(costs) > 20:
            axis.set_xscale("log")
            places = [math.exp(x) for x in side_by_side([math.log(cost) for cost in costs], *heights)]
        else:
            places = side_by_side(costs, *heights, width=max(costs))
            axis.set_xlim(min(0.0, *places), max(1.05 * max(costs), *places))
            axis.locator_params(axis="x", nbins=5)
        for point, place in zip(here, places):
            axis.errorbar(place, point.accuracy, yerr=point.std_err, linestyle="none", **looks.of(point.row))
        drawn.append((axis, [(place, point.accuracy, point.row) for point, place in zip(here, places)]))
        axis.xaxis.set_major_formatter(lambda value, _: magnitude(value))
        axis.xaxis.set_minor_formatter("")
        axis.set_title(wrapped_title(f"{dataset} ({_environments(here[0].environments)})"))
        axis.set_xlabel(name[0].upper() + name[1:])
    title = f"Accuracy against {name}; the line is the Pareto front; {ASIDE}"
    if any(point.single_precision for point in points):
        title += ". Networks that are not quantized count 32 x 32 BitOPs a MAC"
    finish(figure, axes, report, title)
    figure.draw_without_rendering()  # so that points have their place
    unnamed = {name for axis, places in drawn for name in _name_points(axis, places, looks)}
    if unnamed:
        draw_legend(figure, looks, [name for name in looks.names if name in unnamed], lines=False)
    return figure, points, said


def _name_points(axis: Axes, points: Sequence[tuple[float, float, str]], looks: Looks) -> list[str]:
    """Writes names beside points (x, y, name) where there is room; returns those that found none, or are long.

    Places are tried in display coordinates, right, left, above and below; a name may cover no mark and no other name.
    """
    from matplotlib.patheffects import withStroke

    size = 6.5
    halo = [withStroke(linewidth=1.8, foreground="white")]
    pixels = axis.figure.dpi / 72
    spots = [tuple(axis.transData.transform((x, y))) for x, y, _ in points]
    taken = [(x - 4 * pixels, y - 4 * pixels, x + 4 * pixels, y + 4 * pixels) for x, y in spots]
    frame = axis.get_window_extent()
    unnamed = []
    for (x, y), point in sorted(zip(spots, points), key=lambda entry: -entry[0][1]):
        text = looks.label(point[2])
        wide, high = 0.56 * size * len(text) * pixels, 1.15 * size * pixels
        gap = 5 * pixels
        for left, low, ha, va, dx, dy in (
            (x + gap, y - high / 2, "left", "center", 5, 0),
            (x - gap - wide, y - high / 2, "right", "center", -5, 0),
            (x - wide / 2, y + gap, "center", "bottom", 0, 5),
            (x - wide / 2, y - gap - high, "center", "top", 0, -5),
        ):
            box = (left, low, left + wide, low + high)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if (
                inside
                and len(text) <= _NAME_LENGTH
                and not any(b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in taken)
            ):
                taken.append(box)
                axis.annotate(
                    text, point[:2], (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=size,
                    color=colour_of(point[2]), path_effects=halo,
                )  # fmt: skip
                break
        else:
            unnamed.append(point[2])
    return unnamed


def _environments(names: str) -> str:
    return f"test environment {names}" if " " not in names else "average of environments"
