"""`domainbed-sfp export`: a network's file to deploy."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import (
    Commands,
    add_cache_dir,
    add_command,
)


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "export", "write a run's network to a file, without its dead channels", run)
    parser.add_argument("run_dir", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--format", help="safetensors or onnx; default: as FILE ends, else safetensors")
    parser.add_argument("--data_dir", help="compare logits on real images too (embedded sets are compared without)")
    add_cache_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.deploy import export

    print(export.export(args.run_dir, args.output, args.format, args.data_dir, args.cache_dir))
    return 0
