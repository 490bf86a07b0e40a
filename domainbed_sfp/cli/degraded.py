"""`domainbed-sfp degraded`: accuracy on degraded images."""

from __future__ import annotations

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    from domainbed_sfp.analysis.commands import degraded

    text = "accuracy and bit-widths on degraded copies of the test environments, and whether widths move with quality"
    degraded.add_arguments(add_command(commands, "degraded", text, degraded.run))
