"""`domainbed-sfp quickstart`: see what pruning does, in two minutes."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import (
    Commands,
    add_command,
    add_slots,
)


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands, "quickstart", "see in two minutes what pruning does where colours stop agreeing", run
    )
    parser.add_argument("--output_dir", default="quickstart_output")
    add_slots(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.sweep import quickstart

    return quickstart.run(args.output_dir, args.jobs)
