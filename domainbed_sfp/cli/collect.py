"""`domainbed-sfp collect`: tables of a sweep's records, statistics and figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from domainbed_sfp.analysis.account import rows_of_algorithms, take_account
from domainbed_sfp.analysis.comparison import ComparisonReport, compare
from domainbed_sfp.analysis.equal_compression import BEST
from domainbed_sfp.analysis.figures.plots import PLOTS, save_plot
from domainbed_sfp.analysis.figures.style import SUFFIXES
from domainbed_sfp.analysis.published import find_published, load_published
from domainbed_sfp.analysis.render.chosen import CHOSEN_FORMATS
from domainbed_sfp.analysis.render.comparison import latex_comparison, markdown_comparison
from domainbed_sfp.analysis.render.comparison_data import csv_comparison, json_comparison
from domainbed_sfp.analysis.render.data import csv_text, json_text
from domainbed_sfp.analysis.render.domainbed import domainbed_text
from domainbed_sfp.analysis.render.latex import latex_text
from domainbed_sfp.analysis.render.markdown import markdown_text
from domainbed_sfp.analysis.render.top_hparams import top_hparams_text
from domainbed_sfp.analysis.report import build_report
from domainbed_sfp.analysis.selection import RULES, TRAINING_DOMAIN, Rule
from domainbed_sfp.analysis.tables import Report
from domainbed_sfp.cli.output import print_or_write
from domainbed_sfp.cli.parsing import Commands, add_command
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.runs.records import Run, load_records

_FORMATS: dict[str, Callable[[Report], str]] = {
    "markdown": markdown_text,
    "latex": latex_text,
    "csv": csv_text,
    "json": json_text,
}
_COMPARISON_FORMATS: dict[str, Callable[[ComparisonReport], str]] = {
    "markdown": markdown_comparison,
    "latex": latex_comparison,
    "csv": csv_comparison,
    "json": json_comparison,
}
_DOMAINBED = "domainbed"


def add(commands: Commands) -> None:
    """Adds the command and its flags: DomainBed's `--input_dir` and `--latex`, and ours."""
    parser = add_command(commands, "collect", "make tables of the records of a sweep, ours or DomainBed's", run)
    names = ", ".join([*_FORMATS, _DOMAINBED])
    parser.add_argument("--input_dir", required=True, metavar="DIR", help="the sweep: a directory of runs")
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help=f"{names} (default markdown); '{_DOMAINBED}' equals DomainBed's collect_results to the byte, "
        "conventions included, and also writes results.txt or results.tex into --input_dir",
    )
    parser.add_argument("--latex", action="store_true", help="LaTeX; with --format domainbed, DomainBed's own")
    parser.add_argument(
        "--selection",
        metavar="RULE",
        help=f"one of {', '.join(rule.key for rule in RULES)} or all (default all)",
    )
    parser.add_argument(
        "--include_incomplete", action="store_true", help="count runs that have not finished (no file 'done')"
    )
    parser.add_argument(
        "--published",
        nargs="?",
        const="",
        metavar="FILE",
        help="add published rows made under the same protocol (default FILE: the package's published.csv)",
    )
    parser.add_argument("--output", metavar="FILE", help="write to FILE instead of the standard output")
    compared = parser.add_argument_group("statistics and figures, in place of the tables")
    compared.add_argument(
        "--compare",
        nargs="+",
        metavar="ROW",
        help="test the first row, named as the tables name it, against the others, or against every row if it is "
        f"alone; '{BEST}' is the best other row of equal sparsity, or of equal BitOPs",
    )
    compared.add_argument(
        "--exclude", nargs="+", metavar="ROW", help=f"rows or algorithms that '{BEST}' and 'every row' leave out"
    )
    compared.add_argument(
        "--chosen", action="store_true", help="list the run, checkpoint and searched hparams behind each number"
    )
    compared.add_argument(
        "--plot",
        metavar="PLOT",
        help=f"{', '.join(PLOTS)}: draw into --output ({', '.join(SUFFIXES)}), with the numbers as CSV beside it",
    )
    top = parser.add_argument_group("hparams as DomainBed's list_top_hparams prints them, every checkpoint a candidate")
    top.add_argument("--top_hparams", action="store_true", help="list hparams by validation accuracy")
    top.add_argument("--dataset", metavar="D")
    top.add_argument("--algorithm", metavar="A")
    top.add_argument("--test_env", type=int, metavar="E")


def run(args: argparse.Namespace) -> int:
    """Prints or writes the tables; returns the exit status. Raises UserError for bad input."""
    _check_top_hparams(args)
    _check_modes(args)
    if args.plot is not None:
        return _plot(args)
    print_or_write(_text(args), args.output)
    return 0


def _text(args: argparse.Namespace) -> str:
    chosen = _format(args)
    if args.top_hparams:
        runs = _runs_for_domainbed(args.input_dir)
        return top_hparams_text(runs, args.dataset, args.algorithm, args.test_env)
    if chosen == _DOMAINBED:
        return _compatible_text(args)
    report = _report(args, _rules(args.selection))
    if args.chosen:
        return CHOSEN_FORMATS[chosen](report)
    if args.compare is None:
        return _FORMATS[chosen](report)
    return _COMPARISON_FORMATS[chosen](compare(report, args.compare, args.exclude or ()))


def _report(args: argparse.Namespace, rules: list[Rule]) -> Report:
    published = None if args.published is None else load_published(find_published(args.published))
    runs = load_records(args.input_dir, warn=warn)
    account = take_account(runs, args.input_dir, include_incomplete=args.include_incomplete)
    report = build_report(account, rules, published)
    if not report.tables:
        raise UserError(f"--input_dir {args.input_dir} gives no table: {' '.join(report.notes)}")
    return report


def _plot(args: argparse.Namespace) -> int:
    if args.plot not in PLOTS:
        raise unknown_name("--plot", args.plot, PLOTS)
    if args.output is None:
        raise UserError(f"--plot {args.plot} needs --output FILE, whose name ends in {' or '.join(SUFFIXES)}")
    rules = [TRAINING_DOMAIN] if args.selection is None else _rules(args.selection)
    if len(rules) > 1:
        raise UserError("--plot draws one selection rule; give --selection one of them, not all")
    for path in save_plot(args.plot, _report(args, rules), args.output, warn=warn):
        print(f"wrote {path}")
    return 0


def _compatible_text(args: argparse.Namespace) -> str:
    for option in ("selection", "published"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} does not go with --format {_DOMAINBED}, which prints what DomainBed prints")
    runs = _runs_for_domainbed(args.input_dir)
    text = domainbed_text(runs, latex=args.latex)
    _warn_of_conventions(runs)
    beside = Path(args.input_dir) / ("results.tex" if args.latex else "results.txt")
    try:
        write_atomically(beside, text)
    except OSError as error:
        warn(f"{beside} is not written: {error.strerror}")
    return text


def _runs_for_domainbed(input_dir: str) -> list[Run]:
    """All runs, for the formats in which every checkpoint is a candidate: it must have been evaluated then."""
    runs = load_records(input_dir, warn=warn, directory_order=True)
    for run in runs:
        if run.evaluate != "all" and run.steps[0] != 0:
            raise UserError(
                f"{Path(input_dir) / run.directory}: DomainBed's rules choose among all checkpoints, and this run has "
                "records only of those at final compression (--evaluate final); use another format, or train without it"
            )
    return runs


def _warn_of_conventions(runs: list[Run]) -> None:
    """What DomainBed's tables do with runs that it does not know: said beside them, since they stay as they are."""
    for (dataset, algorithm), rows in rows_of_algorithms(runs).items():
        if len(rows) > 1:
            warn(f"{dataset}: DomainBed goes by the algorithm's name, row {algorithm} chooses among {', '.join(rows)}")
    if early := sum(int((~run.final).sum()) for run in runs):
        warn(f"{early:,} checkpoints before their run's final compression are candidates here, as in DomainBed")


def _format(args: argparse.Namespace) -> str:
    if args.format is None:
        return "latex" if args.latex else "markdown"
    if args.format == "html":
        raise UserError("--format html: `domainbed-sfp report --input_dir DIR --output FILE` makes a page of a sweep")
    if args.format not in (*_FORMATS, _DOMAINBED):
        raise unknown_name("--format", args.format, [*_FORMATS, _DOMAINBED])
    if args.latex and args.format not in ("latex", _DOMAINBED):
        raise UserError(f"--latex and --format {args.format} contradict each other; give one of them")
    format_name: str = args.format
    return format_name


def _rules(selection: str | None) -> list[Rule]:
    if selection in (None, "all"):
        return list(RULES)
    rules = [rule for rule in RULES if rule.key == selection]
    if not rules:
        raise unknown_name("--selection", selection, [*(rule.key for rule in RULES), "all"])
    return rules


def _check_top_hparams(args: argparse.Namespace) -> None:
    """--top_hparams goes with --dataset, --algorithm and --test_env, and they with it."""
    needed = ("dataset", "algorithm", "test_env")
    given = [name for name in needed if getattr(args, name) is not None]
    if args.top_hparams and len(given) < len(needed):
        lacking = next(name for name in needed if name not in given)
        raise UserError(f"--top_hparams needs --{lacking}")
    if given and not args.top_hparams:
        raise UserError(f"--{given[0]} goes with --top_hparams")


def _check_modes(args: argparse.Namespace) -> None:
    """Options that would have no effect together are refused."""
    foreign = {
        "plot": ("format", "latex", "compare", "published", "top_hparams", "chosen"),
        "compare": ("published", "top_hparams", "chosen"),
        "chosen": ("published", "top_hparams"),
    }
    for option, others in foreign.items():
        if getattr(args, option) not in (None, False):
            for other in others:
                if getattr(args, other) not in (None, False):
                    raise UserError(f"--{other} does not go with --{option}")
    for option in ("compare", "chosen"):
        if getattr(args, option) not in (None, False) and args.format == _DOMAINBED:
            raise UserError(f"--{option} does not go with --format {_DOMAINBED}, which prints what DomainBed prints")
    if args.exclude is not None and args.compare is None:
        raise UserError("--exclude goes with --compare")
    if args.exclude is not None and len(args.compare) > 1 and BEST not in args.compare[1:]:
        raise UserError(f"--exclude narrows '{BEST}' or 'every row'; --compare names its rows, {BEST!r} not among them")
