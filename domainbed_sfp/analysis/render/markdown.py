"""Tables in Markdown, aligned so that they read well in a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_sfp.analysis.render.grids import BEST, SECOND, Grid, Shown, grids_of
from domainbed_sfp.analysis.tables import Report


def markdown_text(report: Report) -> str:
    """The best of a column in bold, the second underlined; what has to be said stands under each table."""
    return markdown_of(grids_of(report), report.notes)


def markdown_of(grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """Any grids, and what has to be said about all of them."""
    blocks = [_grid_text(grid) for grid in grids]
    if notes:
        blocks.append("".join(f"- {_escape(note)}\n" for note in notes))
    return "\n".join(blocks)


def _grid_text(grid: Grid) -> str:
    lines = [[_escape(name) for name in grid.header]]
    lines += [[_cell(shown) for shown in row] for row in grid.rows]
    widths = [max(3, *(len(line[at]) for line in lines)) for at in range(len(grid.header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    drawn = [
        "| "
        + " | ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    ]
    notes = [f"- {_escape(note)}" for note in (*grid.notes, grid.protocol) if note]
    return "\n".join([f"### {_escape(grid.title)}", "", *drawn, "", *notes, ""])


def _cell(shown: Shown) -> str:
    text = _escape(shown.text)
    return {BEST: f"**{text}**", SECOND: f"<u>{text}</u>"}.get(shown.emphasis, text)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
