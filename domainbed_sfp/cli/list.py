"""`domainbed-sfp list`: what there is to run."""

from __future__ import annotations

import argparse
import sys

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "list", "list algorithms, data sets, hparams or sweep specs", run)
    parser.add_argument("what", choices=["algorithms", "datasets", "hparams", "sweeps"])
    parser.add_argument("--algorithm", default="ERM", help="for hparams")
    parser.add_argument("--dataset", help="for hparams, whose defaults depend on it (PACS)")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.cli import listing
    from domainbed_sfp.core import console

    rows = {
        "algorithms": listing.algorithms,
        "datasets": listing.datasets,
        "hparams": lambda: listing.hparams(args.algorithm, args.dataset or "PACS"),
        "sweeps": listing.sweeps,
    }[args.what]()
    if args.what == "hparams" and args.dataset is None:
        print("These are the defaults on PACS; --dataset NAME shows another data set's.", file=sys.stderr)
    console.show(rows)
    return 0
