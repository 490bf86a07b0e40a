"""How far channel rankings agree, against steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.figures.style import LINES, figure_style, image_bytes
from domainbed_sfp.analysis.rankings import SETTINGS, Row, mean_over_trials
from domainbed_sfp.analysis.render.looks import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(rows: Sequence[Row], suffix: str) -> bytes:
    """A picture: a panel for each data set and choice of test environments, tau against steps; a colour for each
    training environment, a line style for each setting, means over trials. UserError without matplotlib."""
    with figure_style():
        return image_bytes(_draw(rows), suffix)


def _draw(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = mean_over_trials(rows)
    panels = list(dict.fromkeys(key[:2] for key in lines))
    settings = list(dict.fromkeys(key[2:-1] for key in lines))
    # Only what differs between the runs tells them apart.
    shown = [i for i in range(len(SETTINGS)) if len({setting[i] for setting in settings}) > 1]
    styles: Sequence[Any] = LINES
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, axis in zip(panels, axes):
        environments = list(dict.fromkeys(key[-1] for key in lines if key[:2] == panel))
        for key, points in lines.items():
            if key[:2] == panel:
                style = styles[settings.index(key[2:-1]) % len(styles)]
                colour = COLOURS[environments.index(key[-1]) % len(COLOURS)]
                axis.plot(*zip(*points), linestyle=style, color=colour, marker=".")
        handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(environments)]
        if len(settings) > 1:
            for index, setting in enumerate(settings):
                label = ", ".join(f"{SETTINGS[i]} {setting[i]}" for i in shown)
                handles.append(Line2D([], [], color="grey", linestyle=styles[index % len(styles)], label=label))
        axis.set(title=f"{panel[0]}, test {panel[1]}", xlabel="step", ylabel="Kendall's tau")
        axis.legend(handles=handles)
    return figure
