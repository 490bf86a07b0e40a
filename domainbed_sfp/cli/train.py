"""`domainbed-sfp train`: compute one run."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import (
    BREAK_LOCK,
    Commands,
    add_cache_dir,
    add_command,
    add_settings,
)
from domainbed_sfp.runs.settings import SETTINGS, RunSettings


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "train", "compute one run; DomainBed's flags, names and defaults", run)
    add_settings(parser, but=("cache_dir",))
    parser.add_argument("--break_lock", action="store_true", help=BREAK_LOCK)
    add_cache_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.training.train import train_as_process

    values = {name: getattr(args, name) for name in SETTINGS}
    return train_as_process(RunSettings(**values), break_lock=args.break_lock)
