"""Demsar's diagram of mean ranks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.figures.panels import (
    COLUMN_INCHES,
    LINE_HEIGHT,
    POINTS_PER_CHARACTER,
    selection_text,
)
from domainbed_sfp.analysis.figures.points import (
    RankPoint,
    rank_points,
)
from domainbed_sfp.analysis.render.grids import daggered
from domainbed_sfp.analysis.render.looks import COLOURS
from domainbed_sfp.analysis.significance import ALPHA, Ranking
from domainbed_sfp.analysis.tables import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_critical_differences(report: Report) -> tuple[Figure, Sequence[Any], list[str]]:
    """Demsar's diagram (JMLR 2006, figure 1): mean ranks on a line, the best on the left; bars join rows whose ranks
    differ by no more than Nemenyi's critical difference."""
    from matplotlib.figure import Figure

    points, ranking, said = rank_points(report)
    labels = [
        textwrap.wrap(f"{daggered(point.row, point.standing)} ({point.mean_rank:.2f})", 30, break_long_words=False)
        for point in points
    ]
    margin = max(len(line) for label in labels for line in label) * POINTS_PER_CHARACTER / 72 + 0.15
    width = max(COLUMN_INCHES, 2 * margin + 2.0)
    row_height = LINE_HEIGHT * max(map(len, labels)) + 0.05
    first_row = -0.2 - 0.09 * len(ranking.cliques)
    depth = -first_row + row_height * math.ceil(len(points) / 2)
    figure = Figure(figsize=(width, depth + 0.95))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, width)
    axis.set_ylim(-depth, 0.95)
    _draw_ranks(axis, points, ranking, labels, (margin, width - margin), first_row, row_height)
    title = (
        f"Mean ranks over {points[0].datasets.replace(' ', ', ')}; {selection_text(report)}; "
        f"Friedman permutation p = {ranking.p_permutation:.3g}"
    )
    lines = textwrap.wrap(title, int(width * 72 / POINTS_PER_CHARACTER))
    axis.text(width / 2, 0.62, "\n".join(lines), ha="center", va="bottom", fontsize=7)
    return figure, points, said


def _draw_ranks(
    axis: Axes,
    points: Sequence[RankPoint],
    ranking: Ranking,
    labels: Sequence[Sequence[str]],
    ends: tuple[float, float],
    first_row: float,
    row_height: float,
) -> None:
    """In inches: x between `ends` for ranks 1 to the number of rows, y downwards from the line of ranks."""
    count = len(points)
    left, right = ends

    def at(rank: float) -> float:
        return left + (right - left) * (rank - 1) / (count - 1)

    thin: dict[str, Any] = {"color": "black", "linewidth": 0.7, "solid_capstyle": "butt"}
    axis.plot([left, right], [0, 0], **thin)
    for rank in range(1, count + 1):
        axis.plot([at(rank)] * 2, [0, 0.05], **thin)
        if count <= 12 or rank % 2:
            axis.text(at(rank), 0.07, str(rank), ha="center", va="bottom", fontsize=7)
    difference = ranking.critical_difference
    shown = min(difference, count - 1)
    axis.plot([at(1), at(1 + shown)], [0.36, 0.36], color="black", linewidth=1.6, solid_capstyle="butt")
    beyond = ", longer than the line of ranks" if difference > count - 1 else ""
    text = f"CD = {difference:.2f} at {ALPHA}{beyond}"
    axis.text((at(1) + at(1 + shown)) / 2, 0.4, text, ha="center", va="bottom", fontsize=7)
    for number, clique in enumerate(ranking.cliques):
        y = -0.09 * (number + 1)
        first, last = ranking.mean_ranks[clique[0]], ranking.mean_ranks[clique[-1]]
        axis.plot([at(first) - 0.04, at(last) + 0.04], [y, y], color=COLOURS[0], linewidth=2.4, solid_capstyle="butt")
    half = math.ceil(count / 2)
    for index, (point, label) in enumerate(zip(points, labels)):
        on_left = index < half
        row = index if on_left else count - 1 - index
        y = first_row - row_height * (row + 0.5)
        x = at(point.mean_rank)
        side = left - 0.06 if on_left else right + 0.06
        axis.plot([x, x, side], [0, y, y], **thin)
        axis.text(
            side + (-0.04 if on_left else 0.04),
            y,
            "\n".join(label),
            ha="right" if on_left else "left",
            va="center",
            fontsize=7,
        )
