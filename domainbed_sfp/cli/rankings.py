"""`domainbed-sfp rankings`: GlobalPru's channel rankings."""

from __future__ import annotations

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    from domainbed_sfp.analysis.commands import rankings

    text = "how far samples' channel rankings agree with the global one in GlobalPru's runs: CSV and a plot"
    rankings.add_arguments(add_command(commands, "rankings", text, rankings.run))
