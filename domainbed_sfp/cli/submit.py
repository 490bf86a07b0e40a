"""`domainbed-sfp submit`: a bundle for the leaderboard."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "submit", "make a bundle for the leaderboard of one row of a finished sweep", run)
    parser.add_argument("--input_dir", required=True, metavar="DIR", help="the sweep: a directory of runs")
    parser.add_argument(
        "--algorithm", required=True, metavar="NAME", help="the row as the tables call it, such as 'SFP (sparsity=0.7)'"
    )
    parser.add_argument("--output", required=True, metavar="BUNDLE", help="the new folder of the bundle")
    parser.add_argument("--name", help="what the leaderboard shall call it; default: the row's name")
    parser.add_argument(
        "--without_masks", action="store_true", help="of runs that did not keep them: the row is self-reported"
    )
    parser.add_argument(
        "--author_key",
        metavar="FILE",
        help="sign the bundle with this key, which is made if it is not there; who has it may replace the entry",
    )
    parser.add_argument(
        "--with_models", action="store_true", help="put the selected models in, which can be evaluated without training"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.leaderboard import submit

    return submit.run(args)
