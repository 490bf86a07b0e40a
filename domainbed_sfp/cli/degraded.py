"""`domainbed-sfp degraded`: accuracy and bits on degraded copies of the test environments."""

from __future__ import annotations

import argparse

from domainbed_sfp.analysis.degraded import cases_of, summarise
from domainbed_sfp.analysis.figures.degraded import plot
from domainbed_sfp.analysis.figures.style import SUFFIXES
from domainbed_sfp.analysis.render.csv_files import csv_of_points
from domainbed_sfp.analysis.render.degraded import markdown_text
from domainbed_sfp.cli.output import plot_suffix, print_or_write
from domainbed_sfp.cli.parsing import Commands, add_command
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.files import write_output


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    text = "accuracy and bit-widths on degraded copies of the test environments, and whether widths move with quality"
    parser = add_command(commands, "degraded", text, run)
    parser.add_argument("--input_dir", required=True, metavar="DIR", help="the sweep: a directory of runs")
    parser.add_argument("--output", metavar="FILE", help="write the table to FILE instead of the standard output")
    parser.add_argument("--csv", metavar="FILE", help="also write every case: run, degradation, severity")
    parser.add_argument("--plot", metavar="FILE", help=f"also draw bits against severity; {', '.join(SUFFIXES)}")


def run(args: argparse.Namespace) -> int:
    """Writes the table and what else was asked for; returns the exit status. Raises UserError for bad input."""
    suffix = plot_suffix(args.plot)
    cases = cases_of(args.input_dir, warn)
    text = markdown_text(summarise(cases))
    image = plot(cases, suffix) if args.plot else None
    print_or_write(text, args.output)
    if args.csv:
        write_output("--csv", args.csv, csv_of_points(cases))
    if image is not None:
        write_output("--plot", args.plot, image)
    return 0
