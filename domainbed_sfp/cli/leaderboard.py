"""`domainbed-sfp leaderboard`: validate, add, build."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import (
    Commands,
    add_cache_dir,
    add_command,
)


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    text = "validate a bundle, add it to the entries, or build the page of all entries"
    actions = commands.add_parser("leaderboard", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    text = "recompute a bundle's numbers from its records; 1 where something is wrong"
    validate = add_command(actions, "validate", text, run)
    validate.add_argument("--json", action="store_true", help="the outcome for programs")
    add = add_command(actions, "add", "validate a bundle and write its entries", run)
    add.add_argument("--entries_dir", default="results/entries", help="default: %(default)s")
    add.add_argument("--archive", help="where the bundle stays: an https address, or a path from --entries_dir")
    for parser in (validate, add):
        parser.add_argument("bundle", help="the folder that `submit` made, or an archive of it (.tgz, .zip)")
        parser.add_argument(
            "--rerun", type=int, metavar="N", help="also train N cited runs of each test environment again, drawn anew"
        )
        parser.add_argument("--rerun_seed", type=int, help="of that draw; default: a new one, which is printed")
        parser.add_argument(
            "--tolerance", type=float, help="points of accuracy a rerun may differ by on another machine (at most 3)"
        )
        parser.add_argument(
            "--records_only", action="store_true", help="compute neither the first step of all runs nor their models"
        )
        _add_place(parser)
    build = add_command(actions, "build", "render the entries as a page and as tables", _leaderboard_build)
    build.add_argument("--entries_dir", default="results/entries", help="default: %(default)s")
    build.add_argument("--output_dir", default="leaderboard", help="default: %(default)s")
    build.add_argument("--format", nargs="+", metavar="FORMAT", help="html, markdown, latex, csv, json; default: all")
    build.add_argument(
        "--check", action="store_true", help="write nothing; rebuild entries from their bundles, and the page from them"
    )
    build.add_argument(
        "--recompute", action="store_true", help="with --check: also first steps, models and reruns, which takes time"
    )
    _add_place(build)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.leaderboard import commands

    return {"validate": commands.validate, "add": commands.add}[args.action](args)


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Where runs of a bundle are computed again."""
    parser.add_argument("--hours", type=float, help="of computing that may be begun, as estimated (default 2)")
    parser.add_argument("--data_dir", help="of the data sets; embedded ones need none")
    add_cache_dir(parser)


def _leaderboard_build(args: argparse.Namespace) -> int:
    from domainbed_sfp.leaderboard.site import build

    return build.run(args)
