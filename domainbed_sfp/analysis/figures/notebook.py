"""Figures of a sweep's frame, for notebooks: matplotlib Axes to show, to change or to save."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from domainbed_sfp.analysis.figures.plots import PLOTS
from domainbed_sfp.analysis.figures.style import figure_style
from domainbed_sfp.analysis.frames import report_of
from domainbed_sfp.analysis.selection import TRAINING_DOMAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def fronts(frame: pd.DataFrame, rule: str = TRAINING_DOMAIN.key) -> Axes | list[Axes]:
    """Accuracy against MACs, or BitOPs where something is quantized; a line joins what no other row beats in both.

    Parameters
    ----------
    frame : pandas.DataFrame
        What `read_records` gives, or a part of it.
    rule : str
        The selection rule, as in `select`.

    Returns
    -------
    matplotlib.axes.Axes, or a list of them
        One for each data set. `axes.figure` is the figure, to show or to save.

    Examples
    --------
    >>> import domainbed_sfp as dsfp
    >>> axes = dsfp.plot.fronts(dsfp.read_records("results/globalpru_coloured"))
    >>> axes.get_xlabel()
    'Surviving MACs'
    """
    return _drawn("fronts", frame, rule)


def curves(frame: pd.DataFrame, rule: str = TRAINING_DOMAIN.key) -> Axes | list[Axes]:
    """Accuracy against sparsity, one Axes for each environment and for their average; arguments as in `fronts`."""
    return _drawn("curves", frame, rule)


def _drawn(kind: str, frame: pd.DataFrame, rule: str) -> Axes | list[Axes]:
    with figure_style():
        figure, _, _ = PLOTS[kind](report_of(frame, rule))
    axes = [axis for axis in figure.axes if axis.get_title()]
    return axes[0] if len(axes) == 1 else axes
