"""`domainbed-sfp report`: one page of a sweep."""

from __future__ import annotations

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    from domainbed_sfp.analysis.commands import report

    parser = add_command(
        commands, "report", "make one page of a sweep: tables, figures, comparisons, failures", report.run
    )
    report.add_arguments(parser)
