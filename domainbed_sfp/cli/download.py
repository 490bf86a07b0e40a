"""`domainbed-sfp download`: get a data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_sfp.cli.parsing import Commands, add_command
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.download.verify import (
    DATASETS,
    dataset_folder,
    dataset_name,
    left_out,
    shortened,
    summary,
    undecodable,
    verify_tree,
)
from domainbed_sfp.data.download.whole import download


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "download", "get a data set, unpack it and verify it", run)
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder that holds the data sets")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="FILE_OR_URL",
        help="a copy of the public archive (all of them where there are several), or a folder with them",
    )
    parser.add_argument("--verify_only", action="store_true", help="count and decode what is there; fetch nothing")
    parser.add_argument("--force", action="store_true", help="replace the folder that is there")


def run(args: argparse.Namespace) -> int:
    """The command: 0 when the data set is complete in the end; raises UserError otherwise."""
    dataset, data_dir = dataset_name(args.dataset), Path(args.data_dir)
    if args.verify_only:
        # Pixels are looked at only where all files are there: a fetch that broke off is told at once.
        problems = verify_tree(dataset, data_dir) or list(undecodable(dataset, data_dir))
        folder = dataset_folder(dataset, data_dir)
        for line in shortened(problems):
            print(line)
        if line := left_out(dataset, folder):
            print(line)
        if problems:
            number = f"{len(problems):,} problem{'s' * (len(problems) > 1)}"
            raise UserError(f"{dataset} in {data_dir} is not complete: {number}")
    else:
        folder = download(dataset, data_dir, args.sources, force=args.force)
    print("\n".join(summary(dataset, folder)))
    print(f"complete: {folder}")
    return 0
