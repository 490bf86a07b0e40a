"""`domainbed-sfp report`: a sweep as one page."""

from __future__ import annotations

import argparse

from domainbed_sfp.analysis.render.html.page import report_page
from domainbed_sfp.cli.parsing import Commands, add_command
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.files import write_output


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    text = "make one page of a sweep: tables, figures, comparisons, failures"
    parser = add_command(commands, "report", text, run)
    parser.add_argument("--input_dir", required=True, metavar="DIR", help="the sweep: a directory of runs")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default report.html)")
    parser.add_argument(
        "--include_incomplete", action="store_true", help="count runs that have not finished (no file 'done')"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns the exit status. Raises UserError for bad input."""
    text = report_page(args.input_dir, warn, include_incomplete=args.include_incomplete)
    write_output("--output", args.output, text)
    print(f"wrote {args.output}")
    return 0
