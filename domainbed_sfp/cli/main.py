"""The command `domainbed-sfp`: parses flags and calls the parts; nothing is computed here."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NoReturn

from domainbed_sfp.core import crashes
from domainbed_sfp.core.errors import UserError, did_you_mean
from domainbed_sfp.core.version import __version__

if TYPE_CHECKING:
    from domainbed_sfp.sweep.launchers.slurm import SlurmOptions

Command = Callable[[argparse.Namespace], int]

BREAK_LOCK = "remove the locks that a dead machine has left, where the file system has no flock"
_EVALUATE = "checkpoints to evaluate: all, or final: those of a compressed network that selection may choose"


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0 when done, 1 when some work failed, 2 for bad input, 128 + n after signal n.

    Nothing leaves it as a traceback: see `core.crashes`.
    """

    def command() -> int:
        args = make_parser().parse_args(argv)
        return args.run(args)

    words = sys.argv[1:] if argv is None else argv
    sys.exit(crashes.guarded(" ".join(["domainbed-sfp", *takewhile(_is_word, words[:2])]), command))


def _is_word(argument: str) -> bool:
    return not argument.startswith("-")


class _Parser(argparse.ArgumentParser):
    """Names the nearest choice for what is mistyped, in the words of the command that it was given to."""

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(known, "parser", self)
            hint = did_you_mean(unknown[0].split("=")[0], parser._option_string_actions)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known

    def error(self, message: str) -> NoReturn:
        mistyped = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if mistyped:
            message += did_you_mean(mistyped[1], re.findall(r"[\w-]+", mistyped[2]))
        super().error(message)


class _Once(argparse.Action):
    """A flag whose second values would take the place of the first without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice; give it once, with all that belongs to it")
        setattr(namespace, self.dest, values)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="domainbed-sfp", description="Pruning and quantization for domain generalization, on DomainBed's protocol."
    )
    parser.add_argument("--version", action="version", version=f"domainbed-sfp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quickstart(commands)
    _add_list(commands)
    _add_download(commands)
    _add_train(commands)
    _add_sweep(commands)
    _add_collect(commands)
    _add_report(commands)
    _add_export(commands)
    _add_latency(commands)
    _add_rankings(commands)
    _add_degraded(commands)
    _add_upstream(commands)
    _add_new(commands)
    _add_check(commands)
    _add_submit(commands)
    _add_leaderboard(commands)
    return parser


def _add(commands: argparse._SubParsersAction, name: str, text: str, run: Command) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, parser=parser)
    return parser


# quickstart ---------------------------------------------------------------------------------------------------------


def _add_quickstart(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands, "quickstart", "see in two minutes what pruning does where colours stop agreeing", _quickstart
    )
    parser.add_argument("--output_dir", default="quickstart_output")
    _add_slots(parser)


def _quickstart(args: argparse.Namespace) -> int:
    from domainbed_sfp.sweep import quickstart

    return quickstart.run(args.output_dir, args.jobs)


# list ---------------------------------------------------------------------------------------------------------------


def _add_list(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "list", "list algorithms, data sets, hparams or sweep specs", _list)
    parser.add_argument("what", choices=["algorithms", "datasets", "hparams", "sweeps"])
    parser.add_argument("--algorithm", default="ERM", help="for hparams")
    parser.add_argument("--dataset", help="for hparams, whose defaults depend on it (PACS)")


def _list(args: argparse.Namespace) -> int:
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


# download -----------------------------------------------------------------------------------------------------------


def _add_download(commands: argparse._SubParsersAction) -> None:
    from domainbed_sfp.data.download import commands as download

    parser = _add(commands, "download", "get a data set, unpack it and verify it", download.run)
    download.add_arguments(parser)


# train --------------------------------------------------------------------------------------------------------------


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "train", "compute one run; DomainBed's flags, names and defaults", _train)
    parser.add_argument("--data_dir")
    parser.add_argument("--dataset", default="RotatedMNIST")
    parser.add_argument("--algorithm", default="ERM")
    parser.add_argument(
        "--task", default="domain_generalization", choices=["domain_generalization", "domain_adaptation"]
    )
    parser.add_argument("--hparams", action=_Once, help="JSON object of hparams that replace the drawn ones")
    parser.add_argument("--hparams_seed", type=int, default=0, help="0 takes the default hparams, others a random draw")
    parser.add_argument("--trial_seed", type=int, default=0, help="seeds the splits and, with hparams_seed, the draw")
    parser.add_argument("--seed", type=int, default=0, help="seeds everything else")
    parser.add_argument("--steps", type=int, help="default: the data set's")
    parser.add_argument("--checkpoint_freq", type=int, help="steps between records; default: the data set's")
    parser.add_argument("--test_envs", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", default="train_output")
    parser.add_argument("--holdout_fraction", type=float, default=0.2)
    parser.add_argument("--uda_holdout_fraction", type=float, default=0.0)
    parser.add_argument("--skip_model_save", action="store_true")
    parser.add_argument("--save_model_every_checkpoint", action="store_true")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "auto"], help="featurizer's arithmetic")
    parser.add_argument("--evaluate", default="all", choices=["all", "final"], help=_EVALUATE)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--break_lock", action="store_true", help=BREAK_LOCK)
    _add_cache_dir(parser)


def _train(args: argparse.Namespace) -> int:
    from domainbed_sfp.core import runtime
    from domainbed_sfp.runs.settings import RunSettings
    from domainbed_sfp.training import train as training
    from domainbed_sfp.training.interruption import Interrupted

    runtime.prepare_for_training()
    values = {name: getattr(args, name) for name in RunSettings.__dataclass_fields__}
    try:
        training.train(RunSettings(**values), break_lock=args.break_lock)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    return 0


# sweep --------------------------------------------------------------------------------------------------------------


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "sweep", "run a grid of runs; DomainBed's flags, or a spec file with the same keys", _sweep)
    parser.add_argument("action", choices=["launch", "status", "delete_incomplete", "pack"])
    parser.add_argument("spec", nargs="?", help="YAML file, or the name of a shipped one (see: list sweeps)")
    parser.add_argument("--datasets", nargs="+", action=_Once)
    parser.add_argument("--algorithms", nargs="+", action=_Once)
    parser.add_argument("--task", choices=["domain_generalization", "domain_adaptation"])
    parser.add_argument("--n_hparams_from", type=int)
    parser.add_argument("--n_hparams", type=int)
    parser.add_argument("--n_trials_from", type=int, help="first trial seed (0)")
    parser.add_argument("--n_trials", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--checkpoint_freq", type=int)
    parser.add_argument("--hparams", action=_Once, help="JSON object of hparams for all runs")
    parser.add_argument("--holdout_fraction", type=float)
    parser.add_argument("--single_test_envs", action="store_const", const=True)
    parser.add_argument("--precision", choices=["fp32", "bf16", "auto"])
    parser.add_argument("--evaluate", choices=["all", "final"], help=_EVALUATE)
    parser.add_argument("--skip_model_save", action="store_const", const=True, help="keep no model.pkl of each run")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--data_dir")
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
    _add_slots(parser)
    _add_cache_dir(parser)
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


def _sweep(args: argparse.Namespace) -> int:
    from domainbed_sfp.core.hparam import parse_overrides
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


# collect ------------------------------------------------------------------------------------------------------------


def _add_collect(commands: argparse._SubParsersAction) -> None:
    from domainbed_sfp.analysis.commands import collect

    parser = _add(commands, "collect", "make tables of the records of a sweep, ours or DomainBed's", collect.run)
    collect.add_arguments(parser)


def _add_report(commands: argparse._SubParsersAction) -> None:
    from domainbed_sfp.analysis.render.html import page

    parser = _add(commands, "report", "make one page of a sweep: tables, figures, comparisons, failures", page.run)
    page.add_arguments(parser)


# export, latency ----------------------------------------------------------------------------------------------------


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "export", "write a run's network to a file, without its dead channels", _export)
    parser.add_argument("run_dir", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--format", help="safetensors or onnx; default: as FILE ends, else safetensors")
    parser.add_argument("--data_dir", help="compare logits on real images too (embedded sets are compared without)")
    _add_cache_dir(parser)


def _export(args: argparse.Namespace) -> int:
    from domainbed_sfp.deploy import export

    print(export.export(args.run_dir, args.output, args.format, args.data_dir, args.cache_dir))
    return 0


def _add_latency(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "latency", "time a run's dense and exported network on this machine", _latency)
    parser.add_argument("run_dir", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=50, help="timed batches of each network")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", metavar="FILE.json", help="write the numbers, with hardware and versions")


def _latency(args: argparse.Namespace) -> int:
    from domainbed_sfp.deploy import latency

    latency.measure(args.run_dir, args.batch_sizes, args.repeats, args.threads, args.device, args.output)
    return 0


# rankings, degraded --------------------------------------------------------------------------------------------------


def _add_rankings(commands: argparse._SubParsersAction) -> None:
    from domainbed_sfp.analysis import rankings

    text = "how far samples' channel rankings agree with the global one in GlobalPru's runs: CSV and a plot"
    rankings.add_arguments(_add(commands, "rankings", text, rankings.run))


def _add_degraded(commands: argparse._SubParsersAction) -> None:
    from domainbed_sfp.analysis import degraded

    text = "accuracy and bit-widths on degraded copies of the test environments, and whether widths move with quality"
    degraded.add_arguments(_add(commands, "degraded", text, degraded.run))


# upstream -----------------------------------------------------------------------------------------------------------


def _add_upstream(commands: argparse._SubParsersAction) -> None:
    text = "run an unmodified DomainBed checkout with our algorithms registered"
    parser = _add(commands, "upstream", text, _upstream)
    parser.add_argument("--domainbed_root", default=os.environ.get("DOMAINBED_ROOT"), help="default: $DOMAINBED_ROOT")
    parser.add_argument("script", help="train, sweep, collect_results or another module of domainbed.scripts")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to DomainBed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, for sweep --command_launcher slots")


def _upstream(args: argparse.Namespace) -> int:
    from domainbed_sfp.upstream import bridge as upstream

    return upstream.run(args.domainbed_root, args.script, args.arguments, slots=args.jobs)


# new, check, submit, leaderboard -------------------------------------------------------------------------------------


def _add_new(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "new", "write an installable package with an algorithm of your own", _new)
    parser.add_argument("name", help="of the package, such as my_method; its algorithm is then MyMethod")
    parser.add_argument("--output_dir", default=".", help="where the package's folder is made; default: here")


def _new(args: argparse.Namespace) -> int:
    from domainbed_sfp.plugins import new

    return new.run(args.name, args.output_dir)


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "check", "put an algorithm through the contract suite; 1 where a check fails", _check)
    parser.add_argument("algorithm", nargs="?")
    parser.add_argument("--json", action="store_true", help="the report for programs")
    parser.add_argument(
        "--backbone", metavar="NAME", help="say what can be pruned of this network, and by which methods"
    )
    parser.add_argument("--image_size", type=int, default=224, help="side of its images, pixels (default 224)")


def _check(args: argparse.Namespace) -> int:
    if (args.algorithm is None) == (args.backbone is None):
        raise UserError("check: give an algorithm, or --backbone NAME, one of the two")
    if args.backbone and args.json:
        raise UserError("--json does not go with --backbone")
    from domainbed_sfp.plugins import check

    if args.backbone:
        return check.run_backbone(args.backbone, args.image_size)
    return check.run(args.algorithm, args.json)


def _add_submit(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "submit", "make a bundle for the leaderboard of one row of a finished sweep", _submit)
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


def _submit(args: argparse.Namespace) -> int:
    from domainbed_sfp.leaderboard import submit

    return submit.run(args)


def _add_leaderboard(commands: argparse._SubParsersAction) -> None:
    text = "validate a bundle, add it to the entries, or build the page of all entries"
    actions = commands.add_parser("leaderboard", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    text = "recompute a bundle's numbers from its records; 1 where something is wrong"
    validate = _add(actions, "validate", text, _leaderboard)
    validate.add_argument("--json", action="store_true", help="the outcome for programs")
    add = _add(actions, "add", "validate a bundle and write its entries", _leaderboard)
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
    build = _add(actions, "build", "render the entries as a page and as tables", _leaderboard_build)
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


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Where runs of a bundle are computed again."""
    parser.add_argument("--hours", type=float, help="of computing that may be begun, as estimated (default 2)")
    parser.add_argument("--data_dir", help="of the data sets; embedded ones need none")
    _add_cache_dir(parser)


def _leaderboard(args: argparse.Namespace) -> int:
    from domainbed_sfp.leaderboard import commands

    return {"validate": commands.validate, "add": commands.add}[args.action](args)


def _leaderboard_build(args: argparse.Namespace) -> int:
    from domainbed_sfp.leaderboard.site import page

    return page.run(args)


def _add_slots(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=_slots, metavar="N", help="runs at the same time on this machine; auto (default): as fits it"
    )


def _slots(text: str) -> int | None:
    """The number of slots, None for auto."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or a number, got {text!r}") from None


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache_dir", help="decoded images; default: $DOMAINBED_SFP_CACHE or the user's cache folder")
