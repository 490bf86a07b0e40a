"""`domainbed-sfp new`: a package of your own."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "new", "write an installable package with an algorithm of your own", run)
    parser.add_argument("name", help="of the package, such as my_method; its algorithm is then MyMethod")
    parser.add_argument("--output_dir", default=".", help="where the package's folder is made; default: here")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.plugins import new

    return new.run(args.name, args.output_dir)
