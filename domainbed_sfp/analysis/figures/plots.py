"""Figures of a report by name, each with its numbers as CSV beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.figures.critical_differences import draw_critical_differences
from domainbed_sfp.analysis.figures.curves import draw_curves
from domainbed_sfp.analysis.figures.fronts import draw_fronts
from domainbed_sfp.analysis.figures.style import SUFFIXES, figure_style, image_bytes
from domainbed_sfp.analysis.render.csv_files import csv_of_points
from domainbed_sfp.analysis.tables import Report
from domainbed_sfp.core.errors import unknown_name
from domainbed_sfp.core.files import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PLOTS: dict[str, Callable[[Report], tuple[Figure, Sequence[Any], list[str]]]] = {
    "fronts": draw_fronts,
    "cd": draw_critical_differences,
    "curves": draw_curves,
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
    for file, data in ((path, drawn), (numbers, csv_of_points(points))):
        write_output("--output", file, data)
    return [path, numbers]
