"""`domainbed-sfp collect`: tables of a sweep's records."""

from __future__ import annotations

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    from domainbed_sfp.analysis.commands import collect

    parser = add_command(commands, "collect", "make tables of the records of a sweep, ours or DomainBed's", collect.run)
    collect.add_arguments(parser)
