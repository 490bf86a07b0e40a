"""`domainbed-sfp upstream`: run an unmodified DomainBed."""

from __future__ import annotations

import argparse
import os

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    text = "run an unmodified DomainBed checkout with our algorithms registered"
    parser = add_command(commands, "upstream", text, run)
    parser.add_argument("--domainbed_root", default=os.environ.get("DOMAINBED_ROOT"), help="default: $DOMAINBED_ROOT")
    parser.add_argument("script", help="train, sweep, collect_results or another module of domainbed.scripts")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to DomainBed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, for sweep --command_launcher slots")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.upstream import bridge as upstream

    return upstream.run(args.domainbed_root, args.script, args.arguments, slots=args.jobs)
