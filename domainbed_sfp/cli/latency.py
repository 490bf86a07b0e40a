"""`domainbed-sfp latency`: what pruning buys in time."""

from __future__ import annotations

import argparse

from domainbed_sfp.cli.parsing import Commands, add_command


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(commands, "latency", "time a run's dense and exported network on this machine", run)
    parser.add_argument("run_dir", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=50, help="timed batches of each network")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", metavar="FILE.json", help="write the numbers, with hardware and versions")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.deploy import latency

    latency.measure(args.run_dir, args.batch_sizes, args.repeats, args.threads, args.device, args.output)
    return 0
