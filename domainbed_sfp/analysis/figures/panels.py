"""What figures of several panels share: looks of rows, places of points, titles and legends.

Colours are those of `looks`, told apart with any colour vision; marker, filling and line style differ too, so that a
figure survives a grey printer. One panel is as wide as a column of a paper.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.figures.style import LINES
from domainbed_sfp.analysis.render.grids import daggered
from domainbed_sfp.analysis.render.looks import COLOURS, bars_text, colour_of, short_label
from domainbed_sfp.analysis.selection import RULES
from domainbed_sfp.analysis.tables import Report, one_a_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
COLUMN_INCHES = 3.5
_PAGE_INCHES = 7.0
_PANEL_HEIGHT = 2.5
_NAMED_HEIGHT = 3.2
LINE_HEIGHT = 0.145
POINTS_PER_CHARACTER = 3.7  # of a 7 point font, on the safe side
ASIDE = "where bars would overlap, points of one place stand side by side"


class Looks:
    """A colour, marker and line style for every name, the same in all panels; the colour is its algorithm's, and names
    of one colour differ in marker and line."""

    def __init__(self, names: Any) -> None:
        self.standings: dict[str, str | None] = dict(names)
        self.names = list(self.standings)

    def _turn(self, name: str) -> int:
        """How many names before this one have its colour."""
        before = self.names[: self.names.index(name)]
        return sum(colour_of(other) == colour_of(name) for other in before)

    def of(self, name: str) -> dict[str, Any]:
        """Arguments of errorbar and of a legend's handle."""
        turn, colour = self._turn(name), colour_of(name)
        return {
            "color": colour,
            "marker": _MARKERS[(COLOURS.index(colour) + turn) % len(_MARKERS)],
            "markerfacecolor": "white" if turn % 2 else colour,
            "markeredgewidth": 0.9,
            "elinewidth": 0.8,
            "capsize": 1.5,
        }

    def line_style(self, name: str) -> Any:
        return LINES[self._turn(name) % len(LINES)]

    def legend(self, lines: bool, names: Sequence[str] | None = None) -> tuple[list[Any], list[str]]:
        from matplotlib.lines import Line2D

        handles = []
        names = self.names if names is None else names
        for name in names:
            look = {key: value for key, value in self.of(name).items() if key not in ("elinewidth", "capsize")}
            handles.append(Line2D([], [], linestyle=self.line_style(name) if lines else "none", **look))
        return handles, [self.shown(name) for name in names]

    def label(self, name: str) -> str:
        """The name beside a point."""
        return daggered(short_label(name), self.standings[name])

    def shown(self, name: str) -> str:
        """The name in a legend."""
        return "\n".join(textwrap.wrap(self.label(name), 58, break_long_words=False))


def side_by_side(
    values: Sequence[float], accuracies: Sequence[float], errors: Sequence[float | None], width: float | None = None
) -> list[float]:
    """The values, moved a little aside where markers and bars would cover each other.

    Points within 2 % of the axis' `width` (default: the range of the values) are at one place; of those, each takes the
    place nearest to its own that no bar of a higher one reaches.
    """
    width = width or (max(values) - min(values)) or 1.0
    marker = 0.035 * max(1.0, max(accuracies) - min(accuracies))
    places = list(values)
    taken: list[tuple[float, int, float, float]] = []  # value, lane, lowest and highest accuracy
    for at in sorted(range(len(values)), key=lambda at: -accuracies[at]):
        reach = max(errors[at] or 0.0, marker)
        low, high = accuracies[at] - reach, accuracies[at] + reach
        occupied = {
            lane
            for value, lane, other_low, other_high in taken
            if abs(value - values[at]) <= 0.02 * width and low < other_high and other_low < high
        }
        lane = next(lane for step in range(len(values)) for lane in (step, -step) if lane not in occupied)
        taken.append((values[at], lane, low, high))
        places[at] = values[at] + 0.02 * lane * width
    return places


def panels_of(count: int, looks: Looks, named: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels and room for the legend below; `named`: for points with their names beside them,
    which take room themselves. A column wide for one panel, a page for more and for names."""
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else 2 if count in (2, 4) else 3
    rows = math.ceil(count / columns)
    width = COLUMN_INCHES if columns == 1 and not named else _PAGE_INCHES
    labels = [looks.shown(name) for name in looks.names]
    lines = sum(label.count("\n") + 1 for label in labels) / _legend_columns(labels, width)
    height = rows * (_NAMED_HEIGHT if named else _PANEL_HEIGHT) + 0.3
    if not named:
        height += LINE_HEIGHT * (math.ceil(lines) + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _legend_columns(labels: Sequence[str], width: float) -> int:
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return max(1, min(len(labels), int(width * 72 / (longest * POINTS_PER_CHARACTER + 34))))


def finish(figure: Figure, axes: Sequence[Axes], report: Report, title: str) -> None:
    for axis in axes:
        axis.set_ylabel("Accuracy (%)")
        axis.grid(axis="y", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.margins(y=0.08)
    width = figure.get_size_inches()[0]
    bars = ". ".join(dict.fromkeys(map(bars_text, one_a_dataset(report.tables))))
    text = f"{title}. {bars}. {selection_text(report)}."
    figure.suptitle("\n".join(textwrap.wrap(text, int(width * 72 / POINTS_PER_CHARACTER))), fontsize=7)


def draw_legend(figure: Figure, looks: Looks, names: Sequence[str], lines: bool) -> None:
    handles, labels = looks.legend(lines, names)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=_legend_columns(labels, figure.get_size_inches()[0]),
        frameon=False,
        handlelength=2.2,
        columnspacing=1.0,
        labelspacing=0.35,
    )


def selection_text(report: Report) -> str:
    rule = next(rule for rule in RULES if rule is report.tables[0].rule)
    return f"Model selection: {rule.title}"


def wrapped_title(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 42, break_long_words=False))
