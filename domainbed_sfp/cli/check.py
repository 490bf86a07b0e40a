"""`domainbed-sfp check`: the contract of an algorithm."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import Commands, add_command
from domainbed_sfp.core.errors import UserError


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "check", "put an algorithm through the contract suite; 1 where a check fails", run)
    parser.add_argument("algorithm", nargs="?", help="its name, or a Python file that registers it")
    parser.add_argument("--json", action="store_true", help="the report for programs")
    parser.add_argument(
        "--backbone", metavar="NAME", help="say what can be pruned of this network, and by which methods"
    )
    parser.add_argument("--image_size", type=int, default=224, help="side of its images, pixels (default 224)")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if (args.algorithm is None) == (args.backbone is None):
        raise UserError("check: give an algorithm, or --backbone NAME, one of the two")
    if args.backbone and args.json:
        raise UserError("--json does not go with --backbone")
    from domainbed_sfp.plugins import check

    if args.backbone:
        return check.run_backbone(args.backbone, args.image_size)
    return check.run(args.algorithm, args.json)
