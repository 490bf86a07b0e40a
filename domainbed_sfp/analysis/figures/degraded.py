"""Bits, or accuracy, against the severity of degradations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.degraded import NONE, Case, by_severity, summarise
from domainbed_sfp.analysis.figures.style import LINES, figure_style, image_bytes
from domainbed_sfp.analysis.render.grids import daggered
from domainbed_sfp.analysis.render.looks import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(cases: Sequence[Case], suffix: str) -> bytes:
    """Mean bits against severity for the rows that choose them by the sample, or accuracy where no row does: a panel
    for each row, a line for each degradation, means over runs. UserError without matplotlib."""
    with figure_style():
        return image_bytes(_draw(cases), suffix)


def _draw(cases: Sequence[Case]) -> Figure:
    from matplotlib.figure import Figure

    summaries = summarise(cases)
    names = {(s.dataset, s.row): daggered(s.row, s.standing) for s in summaries}
    moving = {(s.dataset, s.row) for s in summaries if s.correlations}
    name, title = ("mean_bits", "mean bits") if moving else ("accuracy", "accuracy (%)")
    panels = list(dict.fromkeys((case.dataset, case.row) for case in cases))
    panels = [panel for panel in panels if panel in moving or not moving]
    kinds = sorted({case.degradation for case in cases} - {NONE})
    styles: Sequence[Any] = LINES
    figure = Figure(figsize=(3.5 * len(panels), 3.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (dataset, row), axis in zip(panels, axes):
        for index, kind in enumerate(kinds):
            here = [c for c in cases if (c.dataset, c.row) == (dataset, row) and c.degradation in (NONE, kind)]
            points = by_severity([here], name)
            style = styles[index % len(styles)]
            axis.plot(
                *zip(*points.items()), color=COLOURS[index % len(COLOURS)], linestyle=style, marker=".", label=kind
            )
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set(title=f"{dataset}\n{names[dataset, row]}", xlabel="severity", ylabel=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")  # inside it would hide points
    return figure
