"""`domainbed-sfp download`: get a data set."""

from __future__ import annotations

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    from domainbed_sfp.data.download import commands as download

    parser = add_command(commands, "download", "get a data set, unpack it and verify it", download.run)
    download.add_arguments(parser)
