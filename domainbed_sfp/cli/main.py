"""The command `domainbed-sfp`: parses flags and calls the parts; nothing is computed here."""

from __future__ import annotations

import sys
from itertools import takewhile
from typing import NoReturn

from domainbed_sfp.cli import (
    check,
    collect,
    degraded,
    download,
    export,
    latency,
    leaderboard,
    new,
    quickstart,
    rankings,
    report,
    submit,
    sweep,
    train,
    upstream,
)
from domainbed_sfp.cli import list as list_
from domainbed_sfp.cli.parsing import Command, Parser
from domainbed_sfp.core import crashes
from domainbed_sfp.core.version import __version__

# In the order of `--help`.
COMMANDS = (
    quickstart, list_, download, train, sweep, collect, report, export, latency, rankings, degraded, upstream, new,
    check, submit, leaderboard,
)  # fmt: skip


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0 when done, 1 when some work failed, 2 for bad input, 128 + n after signal n.

    Nothing leaves it as a traceback: see `core.crashes`.
    """

    def command() -> int:
        args = make_parser().parse_args(argv)
        run: Command = args.run
        return run(args)

    words = sys.argv[1:] if argv is None else argv
    sys.exit(crashes.guarded(" ".join(["domainbed-sfp", *takewhile(_is_word, words[:2])]), command))


def _is_word(argument: str) -> bool:
    return not argument.startswith("-")


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="domainbed-sfp", description="Pruning and quantization for domain generalization, on DomainBed's protocol."
    )
    parser.add_argument("--version", action="version", version=f"domainbed-sfp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
