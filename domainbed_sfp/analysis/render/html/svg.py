"""Charts as SVG elements for a page: colours of the page's theme, every point reachable by keyboard.

A tooltip is an element beside its point that style sheets show on hover and focus, so that no script is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from domainbed_sfp.analysis.render.looks import colour_of

WIDTH, HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 48
_SHAPES = ("circle", "square", "diamond", "triangle")
_CHARACTER = 6.3  # width of a letter of 11 px, on the safe side


@dataclass(frozen=True)
class Look:
    """How a row is drawn, the same in every chart of a page."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Point:
    """label: drawn beside the point where there is room; tip: what hover, focus and screen readers tell."""

    x: float
    y: float
    look: Look
    label: str
    tip: str
    error: float | None = None
    joined: bool = False


@dataclass(frozen=True)
class Line:
    """A curve through (x, y), by rising x."""

    label: str
    look: Look
    points: Sequence[tuple[float, float]]


def looks_of(rows: Sequence[str]) -> dict[str, Look]:
    """A look for every row: its algorithm's colour, and the first shape that no row of that colour has before it."""
    looks: dict[str, Look] = {}
    for row in rows:
        colour = colour_of(row)
        before = sum(look.colour == colour for look in looks.values())
        looks[row] = Look(colour, _SHAPES[before % len(_SHAPES)])
    return looks


def scatter(
    points: Sequence[Point],
    title: str,
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str] | None = None,
    places: Sequence[str] = (),
) -> str:
    """Points with error bars; a stepped line joins those that are `joined`.

    Args:
        x_text: how a number on the x axis is written.
        places: names that stand on the x axis at 0, 1, 2, ... in place of numbers.
    """
    if places:
        scale = _Scale.of([-0.45, len(places) - 0.5], _reach(points), x_from_zero=False)
        ticks = [(float(at), name) for at, name in enumerate(places)]
    else:
        scale = _Scale.of([p.x for p in points], _reach(points), x_from_zero=True)
        ticks = [(value, (x_text or _short)(value)) for value in _ticks(scale.low_x, scale.high_x)]
    parts = [_frame(scale, x_title, y_title, ticks)]
    front = sorted((p for p in points if p.joined), key=lambda p: (p.x, p.y))
    if front:
        path = f"M{scale.x(front[0].x):.1f} {scale.y(front[0].y):.1f}"
        path += "".join(f"H{scale.x(p.x):.1f}V{scale.y(p.y):.1f}" for p in front[1:])
        parts.append(f'<path class="front" d="{path}H{WIDTH - _RIGHT}"/>')
    taken = [_box(scale.x(p.x) - 5, scale.y(p.y) - 5, 10, 10) for p in points]
    labels, marks = [], []
    for point in points:
        x, y = scale.x(point.x), scale.y(point.y)
        labels.append(_label(point.label, x, y, taken))
        marks.append(_point(point, x, y, scale))
    return _svg(title, [*parts, *labels, *marks])


def chart(lines: Sequence[Line], title: str, x_title: str, y_title: str) -> str:
    """Curves, named in a key below the chart."""
    xs = [x for line in lines for x, _ in line.points]
    scale = _Scale.of(xs, [y for line in lines for _, y in line.points], x_from_zero=False)
    ticks = [(value, _short(value)) for value in _ticks(scale.low_x, scale.high_x)]
    parts = [_frame(scale, x_title, y_title, ticks)]
    for line in lines:
        path = "M" + "L".join(f"{scale.x(x):.1f} {scale.y(y):.1f}" for x, y in line.points)
        tip = f"{line.label}: {line.points[-1][1]:.4g} at step {line.points[-1][0]:g}"
        dots = "".join(
            _mark(line.look, scale.x(x), scale.y(y), 2.5) for x, y in (line.points if len(line.points) < 40 else ())
        )
        parts.append(
            f'<g class="curve" tabindex="0" role="img" aria-label="{escape(tip)}"><title>{escape(tip)}</title>'
            f'<path d="{path}" stroke="{line.look.colour}"/>{dots}</g>'
        )
    return _svg(title, parts)


def key(looks: dict[str, Look]) -> str:
    """The key of charts: every name with its mark, as a list."""
    items = (
        f'<li><svg viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">{_mark(look, 6, 6, 4.5)}</svg> '
        f"{escape(name)}</li>"
        for name, look in looks.items()
    )
    return f'<ul class="key">{"".join(items)}</ul>'


@dataclass(frozen=True)
class _Scale:
    low_x: float
    high_x: float
    low_y: float
    high_y: float

    @classmethod
    def of(cls, xs: Sequence[float], ys: Sequence[float], x_from_zero: bool) -> _Scale:
        low_x, high_x = (0.0 if x_from_zero else min(xs)), max(xs)
        spread = (max(ys) - min(ys)) or 1.0
        return cls(low_x, high_x + 0.05 * ((high_x - low_x) or 1.0), min(ys) - 0.08 * spread, max(ys) + 0.08 * spread)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - _TOP - _BOTTOM)


def _reach(points: Sequence[Point]) -> list[float]:
    return [y for p in points for y in (p.y - (p.error or 0), p.y + (p.error or 0))]


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step)
    return [round(step * at, 12) for at in range(first, math.floor(high / step) + 1)]


def _frame(scale: _Scale, x_title: str, y_title: str, x_ticks: Sequence[tuple[float, str]]) -> str:
    floor = HEIGHT - _BOTTOM
    parts = []
    for value in _ticks(scale.low_y, scale.high_y):
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value, text in x_ticks:
        place = f'x="{scale.x(value):.1f}" y="{floor + 16}" text-anchor="middle"'
        parts.append(f'<text class="tick" {place}>{escape(text)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_title)}</text>')
    height = (floor + _TOP) / 2
    parts.append(f'<text transform="translate(14 {height}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
    return "".join(parts)


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _point(point: Point, x: float, y: float, scale: _Scale) -> str:
    bar = ""
    if point.error:
        top, bottom = scale.y(point.y + point.error), scale.y(point.y - point.error)
        bar = f'<path class="error" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>'
    lines = point.tip.split("\n")
    wide = max(map(len, lines)) * _CHARACTER + 16
    left = min(max(x + 10, _LEFT), WIDTH - wide)
    top = y - 14 - 15 * len(lines) if y > HEIGHT / 2 else y + 12
    text = "".join(
        f'<tspan x="{left + 8:.1f}" y="{top + 16 + 15 * at:.1f}">{escape(one)}</tspan>' for at, one in enumerate(lines)
    )
    return (
        f'<g class="point" tabindex="0" role="img" aria-label="{escape(point.tip)}">{bar}'
        f'<circle class="area" cx="{x:.1f}" cy="{y:.1f}" r="11"/>{_mark(point.look, x, y, 5)}'
        f'<g class="tip" aria-hidden="true"><rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" '
        f'height="{15 * len(lines) + 10}" rx="4"/><text>{text}</text></g></g>'
    )


def _mark(look: Look, x: float, y: float, r: float) -> str:
    fill = f'fill="{look.colour}"'
    if look.shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {fill}/>'
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    }[look.shape]
    path = "L".join(f"{x + r * dx:.1f} {y + r * dy:.1f}" for dx, dy in corners)
    return f'<path d="M{path}Z" {fill}/>'


_Box = tuple[float, float, float, float]


def _box(left: float, top: float, wide: float, high: float) -> _Box:
    return left, top, left + wide, top + high


def _label(text: str, x: float, y: float, taken: list[_Box]) -> str:
    """The name beside its point, at the first of four places that is free; nowhere if none is."""
    wide = len(text) * _CHARACTER
    for left, base, anchor in (
        (x + 9, y + 4, "start"),
        (x - 9 - wide, y + 4, "end"),
        (x - wide / 2, y - 10, "middle"),
        (x - wide / 2, y + 19, "middle"),
    ):
        box = _box(left, base - 10, wide, 13)
        inside = box[0] >= _LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - _BOTTOM
        if inside and not any(b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in taken):
            taken.append(box)
            at = {"start": left, "end": left + wide, "middle": left + wide / 2}[anchor]
            return (
                f'<text class="label" x="{at:.1f}" y="{base:.1f}" text-anchor="{anchor}" aria-hidden="true">'
                f"{escape(text)}</text>"
            )
    return ""


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
