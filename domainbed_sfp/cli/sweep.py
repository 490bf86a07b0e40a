"""`domainbed-sfp sweep`: run a grid of runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from domainbed_sfp.cli.parsing import (
    BREAK_LOCK,
    Commands,
    Once,
    add_cache_dir,
    add_command,
    add_setting,
    add_slots,
)
from domainbed_sfp.core.errors import UserError

if TYPE_CHECKING:
    from domainbed_sfp.sweep.launchers.slurm import SlurmOptions


def add(commands: Commands) -> None:
    """Adds the command and its flags."""
    parser = add_command(
        commands, "sweep", "run a grid of runs; DomainBed's flags, or a spec file with the same keys", run
    )
    parser.add_argument("action", choices=["launch", "status", "delete_incomplete", "pack"])
    parser.add_argument("spec", nargs="?", help="YAML file, or the name of a shipped one (see: list sweeps)")
    parser.add_argument("--datasets", nargs="+", action=Once)
    parser.add_argument("--algorithms", nargs="+", action=Once)
    add_setting(parser, "task", default=None)
    parser.add_argument("--n_hparams_from", type=int)
    parser.add_argument("--n_hparams", type=int)
    parser.add_argument("--n_trials_from", type=int, help="first trial seed (0)")
    parser.add_argument("--n_trials", type=int)
    add_setting(parser, "steps", help=None)
    add_setting(parser, "checkpoint_freq", help=None)
    add_setting(parser, "hparams", help="JSON object of hparams for all runs")
    add_setting(parser, "holdout_fraction", default=None)
    parser.add_argument("--single_test_envs", action="store_const", const=True)
    add_setting(parser, "precision", default=None, help=None)
    add_setting(parser, "evaluate", default=None)
    parser.add_argument("--skip_model_save", action="store_const", const=True, help="keep no model.pkl of each run")
    parser.add_argument("--output_dir", required=True)
    add_setting(parser, "data_dir")
    parser.add_argument(
        "--command_launcher", default="local", help="local, multi_gpu, slurm, or dummy to print the commands"
    )
    parser.add_argument("--skip_confirmation", action="store_true")
    parser.add_argument("--break_lock", action="store_true", help=BREAK_LOCK)
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS",
        help="for status: show a table anew every so many seconds (10) until nothing waits or runs",
    )  # fmt: skip
    parser.add_argument(
        "--drop", nargs="+", metavar="NAME",
        help="for pack, which moves the records of all finished runs into one file: what else their folders may lose, "
        "such as out.txt err.txt masks model.pkl",
    )  # fmt: skip
    add_slots(parser)
    add_cache_dir(parser)
    _add_slurm(parser)


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group(
        "slurm", "for launch with --command_launcher slurm; what is not given is left to the cluster's defaults"
    )
    cluster.add_argument("--slurm_partition", metavar="NAME", help="partition of the jobs")
    cluster.add_argument("--slurm_account", metavar="NAME", help="account they are charged to")
    cluster.add_argument("--slurm_gpus", type=int, metavar="N", help="GPUs of each job")
    cluster.add_argument("--slurm_cpus", type=int, metavar="N", help="cores of each job, which are its threads")
    cluster.add_argument("--slurm_mem", metavar="SIZE", help="memory of each job, such as 16G")
    cluster.add_argument(
        "--slurm_time", metavar="LIMIT",
        help="time limit of a job, such as 90 (minutes), 1:30:00 or 2-12:00; a run that needs longer saves before it "
        "and is requeued",
    )  # fmt: skip
    cluster.add_argument("--slurm_max_parallel", type=int, metavar="N", help="jobs of this launch at the same time")
    cluster.add_argument(
        "--slurm_extra", nargs="+", action="extend", metavar="OPTION=VALUE",
        help="any other option of sbatch, such as qos=high constraint=a100 exclusive",
    )  # fmt: skip
    cluster.add_argument(
        "--slurm_setup", nargs="+", action="extend", metavar="COMMAND",
        help="shell commands to run before each job, such as 'module load cuda'",
    )  # fmt: skip
    cluster.add_argument("--max_retries", type=int, metavar="N", help="how often a job that died is launched again (3)")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from domainbed_sfp.core.overrides import parse_overrides
    from domainbed_sfp.sweep import commands
    from domainbed_sfp.sweep.pack import pack

    if args.drop is not None and args.action != "pack":
        raise UserError(f"--drop goes with sweep pack, not with {args.action}")
    if args.action == "pack":
        if args.spec:
            raise UserError(f"sweep pack packs all finished runs of --output_dir, and takes no spec ({args.spec!r})")
        return pack(args.output_dir, args.drop or (), break_lock=args.break_lock)
    spec = commands.read_spec(args.spec) if args.spec else commands.default_spec()
    if args.spec:
        commands.check_rows(spec, args.spec)
    overrides = {**spec.hparams, **parse_overrides(args.hparams)} if args.hparams else None
    # Without a grid DomainBed asks for that of everything it has; a launched sweep knows its own.
    is_open = not args.spec and args.datasets is None and args.algorithms is None
    names = (
        "datasets", "algorithms", "task", "n_hparams_from", "n_hparams", "n_trials_from", "n_trials", "steps",
        "checkpoint_freq", "holdout_fraction", "single_test_envs", "precision", "evaluate",
        "skip_model_save",
    )  # fmt: skip
    spec = spec.updated(**{name: getattr(args, name) for name in names}, hparams=overrides)
    if args.watch is not None and args.action != "status":
        raise UserError(f"--watch goes with sweep status, not with {args.action}")
    if args.action == "status":
        if is_open and commands.holds_a_sweep(args.output_dir):
            return commands.status(None, args.data_dir, args.output_dir, watch=args.watch)
        return commands.status(spec, args.data_dir, args.output_dir, watch=args.watch)
    if args.action == "delete_incomplete":
        return commands.delete_incomplete(
            spec, args.data_dir, args.output_dir, ask=not args.skip_confirmation, break_lock=args.break_lock
        )
    return commands.launch(
        spec,
        args.data_dir,
        args.output_dir,
        launcher=args.command_launcher,
        slots=args.jobs,
        ask=not args.skip_confirmation,
        cache_dir=args.cache_dir,
        slurm_options=_slurm_options(args),
        break_lock=args.break_lock,
    )


def _slurm_options(args: argparse.Namespace) -> SlurmOptions | None:
    """The flags of the group slurm; None with another launcher, which has none of them."""
    from domainbed_sfp.sweep.launchers.slurm import SlurmOptions

    flags = [name for name in vars(args) if name.startswith("slurm_")] + ["max_retries"]
    given = {name: value for name in flags if (value := getattr(args, name)) is not None}
    if args.command_launcher != "slurm":
        if given:
            raise UserError(f"--{next(iter(given))} goes with --command_launcher slurm, not {args.command_launcher}")
        return None
    if args.jobs is not None:
        raise UserError("--jobs counts runs on this machine; with --command_launcher slurm use --slurm_max_parallel")
    values: dict[str, Any] = {}
    for name, value in given.items():
        values[name.removeprefix("slurm_")] = tuple(value) if isinstance(value, list) else value
    return SlurmOptions(**values)
