"""Figures of a report: Pareto fronts, accuracy against sparsity, critical differences; the numbers as CSV beside.

Colours are those of `looks`, told apart with any colour vision; marker, filling
and line style differ too, so that a figure survives a grey printer. One panel is as wide as a column of a paper.
matplotlib is the extra `plots`.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.figures.looks import COLOURS, colour_of, short_label
from domainbed_sfp.analysis.figures.points import (
    AVERAGE,
    CurvePoint,
    RankPoint,
    csv_of,
    curve_points,
    front_points,
    rank_points,
)
from domainbed_sfp.analysis.render.grids import daggered, magnitude
from domainbed_sfp.analysis.selection import RULES
from domainbed_sfp.analysis.significance import ALPHA, Ranking
from domainbed_sfp.analysis.tables import Report
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", ":", "-.")

_COLUMN_INCHES = 3.5
_PAGE_INCHES = 7.0
_PANEL_HEIGHT = 2.5
_NAMED_HEIGHT = 3.2
_NAME_LENGTH = 28  # letters of a name beside a point; longer ones go into the legend
_LINE_HEIGHT = 0.145
_POINTS_PER_CHARACTER = 3.7  # of a 7 point font, on the safe side

_ASIDE = "where bars would overlap, points of one place stand side by side"

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "domainbed_sfp",
}


def save_plot(kind: str, report: Report, output: str, *, warn: Callable[[str], None]) -> list[Path]:
    """Draws `kind` of PLOTS into the file `output` and writes its numbers into the CSV file of the same name.

    The report must hold one selection rule. `warn` is told what the figure leaves out. Raises UserError for an unknown
    suffix, a report that does not hold what the figure shows, or a file that cannot be written.
    """
    path = Path(output)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise unknown_name("suffix of --output", path.suffix or path.name, SUFFIXES)
    with figure_style():
        figure, points, said = PLOTS[kind](report)
        drawn = image_bytes(figure, suffix)
    for one in said:
        warn(one)
    numbers = path.with_suffix(".csv")
    for file, data in ((path, drawn), (numbers, csv_of(points))):
        try:
            write_atomically(file, data)
        except OSError as error:
            raise UserError(f"--output {file}: {error.strerror}") from error
    return [path, numbers]


@contextmanager
def figure_style() -> Iterator[None]:
    """Our style while it lasts, whatever the user's is, so that a figure is the same everywhere. UserError without
    matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            "--plot draws with matplotlib, which is not installed: pip install 'domainbed_sfp[plots]'"
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def image_bytes(figure: Figure, suffix: str) -> bytes:
    """The file of a figure, for a suffix of SUFFIXES."""
    drawn = io.BytesIO()
    # The date would make two drawings of the same records differ.
    metadata = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]
    figure.savefig(drawn, format=suffix[1:], dpi=300, metadata=metadata, bbox_inches="tight", pad_inches=0.04)
    return drawn.getvalue()


# fronts -------------------------------------------------------------------------------------------------------------


def _fronts(report: Report) -> tuple[Figure, Sequence[Any], list[str]]:
    """Accuracy against cost, one panel a data set; a line joins the rows that no other beats in both."""
    points, said = front_points(report)
    looks = _Looks((point.row, point.standing) for point in points)
    panels = list(dict.fromkeys(point.dataset for point in points))
    figure, axes = _panels(len(panels), looks, named=True)
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
            places = [math.exp(x) for x in _side_by_side([math.log(cost) for cost in costs], *heights)]
        else:
            places = _side_by_side(costs, *heights, width=max(costs))
            axis.set_xlim(min(0.0, *places), max(1.05 * max(costs), *places))
            axis.locator_params(axis="x", nbins=5)
        for point, place in zip(here, places):
            axis.errorbar(place, point.accuracy, yerr=point.std_err, linestyle="none", **looks.of(point.row))
        drawn.append((axis, [(place, point.accuracy, point.row) for point, place in zip(here, places)]))
        axis.xaxis.set_major_formatter(lambda value, _: magnitude(value))
        axis.xaxis.set_minor_formatter("")
        axis.set_title(_title(f"{dataset} ({_environments(here[0].environments)})"))
        axis.set_xlabel(name[0].upper() + name[1:])
    title = f"Accuracy against {name}; the line is the Pareto front; {_ASIDE}"
    if any(point.single_precision for point in points):
        title += ". Networks that are not quantized count 32 x 32 BitOPs a MAC"
    _finish(figure, axes, report, title)
    figure.draw_without_rendering()  # so that points have their place
    unnamed = {name for axis, places in drawn for name in _name_points(axis, places, looks)}
    if unnamed:
        _legend(figure, looks, [name for name in looks.names if name in unnamed], lines=False)
    return figure, points, said


# curves -------------------------------------------------------------------------------------------------------------


def _curves(report: Report) -> tuple[Figure, Sequence[Any], list[str]]:
    """Accuracy against sparsity, one panel for every environment of every data set and their average."""
    points, said = curve_points(report)
    looks = _Looks((point.line, point.standing) for point in points)
    panels = list(dict.fromkeys((point.dataset, point.environment) for point in points))
    figure, axes = _panels(len(panels), looks)
    for axis, panel in zip(axes, panels):
        here = [point for point in points if (point.dataset, point.environment) == panel]
        places = _side_by_side(
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
        axis.set_title(_title(f"{panel[0]}: {panel[1] if panel[1] != AVERAGE else 'average of environments'}"))
        axis.set_xlabel("Sparsity (%)")
        axis.set_xlim(min(0.0, *places) - 3, max(100.0, *places) + 3)
    _finish(
        figure,
        axes,
        report,
        f"Accuracy against sparsity; {_ASIDE}",
    )
    _legend(figure, looks, looks.names, lines=True)
    return figure, points, said


def _curve(axis: Axes, points: Sequence[tuple[float, CurvePoint]], looks: _Looks, line: str) -> None:
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


# critical differences -----------------------------------------------------------------------------------------------


def _critical_differences(report: Report) -> tuple[Figure, Sequence[Any], list[str]]:
    """Demsar's diagram (JMLR 2006, figure 1): mean ranks on a line, the best on the left; bars join rows whose ranks
    differ by no more than Nemenyi's critical difference."""
    from matplotlib.figure import Figure

    points, ranking, said = rank_points(report)
    labels = [
        textwrap.wrap(f"{daggered(point.row, point.standing)} ({point.mean_rank:.2f})", 30, break_long_words=False)
        for point in points
    ]
    margin = max(len(line) for label in labels for line in label) * _POINTS_PER_CHARACTER / 72 + 0.15
    width = max(_COLUMN_INCHES, 2 * margin + 2.0)
    row_height = _LINE_HEIGHT * max(map(len, labels)) + 0.05
    first_row = -0.2 - 0.09 * len(ranking.cliques)
    depth = -first_row + row_height * math.ceil(len(points) / 2)
    figure = Figure(figsize=(width, depth + 0.95))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(0, width)
    axis.set_ylim(-depth, 0.95)
    _draw_ranks(axis, points, ranking, labels, (margin, width - margin), first_row, row_height)
    title = (
        f"Mean ranks over {points[0].datasets.replace(' ', ', ')}; {_selection(report)}; "
        f"Friedman permutation p = {ranking.p_permutation:.3g}"
    )
    lines = textwrap.wrap(title, int(width * 72 / _POINTS_PER_CHARACTER))
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


# what they share ----------------------------------------------------------------------------------------------------


class _Looks:
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


def _name_points(axis: Axes, points: Sequence[tuple[float, float, str]], looks: _Looks) -> list[str]:
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


def _side_by_side(
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


def _panels(count: int, looks: _Looks, named: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels and room for the legend below; `named`: for points with their names beside them,
    which take room themselves. A column wide for one panel, a page for more and for names."""
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else 2 if count in (2, 4) else 3
    rows = math.ceil(count / columns)
    width = _COLUMN_INCHES if columns == 1 and not named else _PAGE_INCHES
    labels = [looks.shown(name) for name in looks.names]
    lines = sum(label.count("\n") + 1 for label in labels) / _legend_columns(labels, width)
    height = rows * (_NAMED_HEIGHT if named else _PANEL_HEIGHT) + 0.3
    if not named:
        height += _LINE_HEIGHT * (math.ceil(lines) + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _legend_columns(labels: Sequence[str], width: float) -> int:
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return max(1, min(len(labels), int(width * 72 / (longest * _POINTS_PER_CHARACTER + 34))))


def _finish(figure: Figure, axes: Sequence[Axes], report: Report, title: str) -> None:
    for axis in axes:
        axis.set_ylabel("Accuracy (%)")
        axis.grid(axis="y", color="0.9", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.margins(y=0.08)
    width = figure.get_size_inches()[0]
    text = f"{title}. Bars: standard error over trials. {_selection(report)}."
    figure.suptitle("\n".join(textwrap.wrap(text, int(width * 72 / _POINTS_PER_CHARACTER))), fontsize=7)


def _legend(figure: Figure, looks: _Looks, names: Sequence[str], lines: bool) -> None:
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


def _selection(report: Report) -> str:
    rule = next(rule for rule in RULES if rule is report.tables[0].rule)
    return f"Model selection: {rule.title}"


def _title(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 42, break_long_words=False))


def _environments(names: str) -> str:
    return f"test environment {names}" if " " not in names else "average of environments"


PLOTS: dict[str, Callable[[Report], tuple[Figure, Sequence[Any], list[str]]]] = {
    "fronts": _fronts,
    "cd": _critical_differences,
    "curves": _curves,
}
