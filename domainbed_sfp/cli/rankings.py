"""`domainbed-sfp rankings`: how far samples' channel rankings agree with GlobalPru's global one."""

from __future__ import annotations

import argparse

from domainbed_sfp.analysis.figures.rankings import plot
from domainbed_sfp.analysis.figures.style import SUFFIXES
from domainbed_sfp.analysis.rankings import COLUMNS, agreement_rows
from domainbed_sfp.analysis.render.csv_files import csv_of_lines
from domainbed_sfp.cli.output import plot_suffix, print_or_write
from domainbed_sfp.cli.parsing import Commands, add_command
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.files import write_output


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    text = "how far samples' channel rankings agree with the global one in GlobalPru's runs: CSV and a plot"
    parser = add_command(commands, "rankings", text, run)
    parser.add_argument("--input_dir", required=True, metavar="DIR", help="the sweep: a directory of runs")
    parser.add_argument("--output", metavar="FILE", help="write the CSV to FILE instead of the standard output")
    parser.add_argument("--plot", metavar="FILE", help=f"also draw tau against steps; {', '.join(SUFFIXES)}")


def run(args: argparse.Namespace) -> int:
    """Writes the CSV and, if asked, the plot; returns the exit status. Raises UserError for bad input."""
    suffix = plot_suffix(args.plot)
    rows = agreement_rows(args.input_dir, warn)
    image = plot(rows, suffix) if args.plot else None
    print_or_write(csv_of_lines(COLUMNS, rows), args.output)
    if image is not None:
        write_output("--plot", args.plot, image)
    return 0
