"""Tables in LaTeX, for a paper: booktabs, captions with the protocol, the best in bold, the second
underlined."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_sfp.analysis.render.grids import BEST, SECOND, Grid, Shown, grids_of
from domainbed_sfp.analysis.tables import Report

_SPECIAL = {
    "\\": "\\textbackslash{}",
    "&": "\\&",
    "%": "\\%",
    "$": "\\$",
    "#": "\\#",
    "_": "\\_",
    "{": "\\{",
    "}": "\\}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "±": "$\\pm$",
    "\N{EN DASH}": "--",
    "†": "$^\\dagger$",
}


def latex_text(report: Report) -> str:
    """One `table` a grid; the preamble needs only \\usepackage{booktabs}."""
    return latex_of(grids_of(report), report.notes)


def latex_of(grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """Any grids, and what has to be said about all of them, as comments."""
    blocks = ["% Needs \\usepackage{booktabs} in the preamble.", *(_table(grid) for grid in grids)]
    blocks += [f"% {note}" for note in notes]
    return "\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _table(grid: Grid) -> str:
    rows = [" & ".join(_cell(shown) for shown in row) + " \\\\" for row in grid.rows]
    notes = [f"\\par\\footnotesize {escape(note)}" for note in grid.notes]
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{escape(f'{grid.title}. {grid.protocol}'.strip())}}}",
            f"\\label{{tab:{grid.name}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}",
            "\\toprule",
            " & ".join(escape(name) for name in grid.header) + " \\\\",
            "\\midrule",
            *rows,
            "\\bottomrule",
            "\\end{tabular}",
            *notes,
            "\\end{table}",
        ]
    )


def _cell(shown: Shown) -> str:
    text = escape(shown.text)
    return {BEST: f"\\textbf{{{text}}}", SECOND: f"\\underline{{{text}}}"}.get(shown.emphasis, text)
