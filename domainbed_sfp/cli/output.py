"""A result's way to a file or the standard output."""

from __future__ import annotations

import sys
from pathlib import Path

from domainbed_sfp.analysis.figures.style import SUFFIXES
from domainbed_sfp.core.errors import unknown_name
from domainbed_sfp.core.files import write_output


def print_or_write(text: str, output: str | None) -> None:
    """To the file of --output, or else to the standard output."""
    if output is None:
        sys.stdout.write(text)
    else:
        write_output("--output", output, text)


def plot_suffix(plot: str | None) -> str:
    """How the file of --plot ends, empty without one. Raises UserError where it is no picture's."""
    suffix = Path(plot).suffix.lower() if plot else ""
    if plot and suffix not in SUFFIXES:
        raise unknown_name("suffix of --plot", suffix or plot, SUFFIXES)
    return suffix
