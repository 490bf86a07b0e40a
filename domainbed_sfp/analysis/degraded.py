"""What the last records say of degraded copies of their test environments: accuracy, bit-widths, and whether the
widths move with quality.

Of each run that has them, `training.evaluate_degraded` wrote the numbers for 100 images as they are (severity 0) and in
every degradation and severity (1 to 5).
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.figures.looks import COLOURS
from domainbed_sfp.analysis.figures.plots import LINES, SUFFIXES, figure_style, image_bytes
from domainbed_sfp.analysis.methods import Method, alike, label_methods, method_of
from domainbed_sfp.analysis.render.grids import ABSENT, RECONSTRUCTION_NOTE, daggered
from domainbed_sfp.analysis.rows import RECONSTRUCTION
from domainbed_sfp.analysis.significance import paired_test
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.files import write_output
from domainbed_sfp.runs.layout import RESULTS
from domainbed_sfp.runs.packed import run_folders
from domainbed_sfp.runs.records import Warn, is_done, last_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIELD = re.compile(r"env(\d+)_degraded")
NONE = "none"
# By these, runs of one method on one data set differ.
SEEDS = ("test_envs", "hparams_seed", "trial_seed")


@dataclass(frozen=True, slots=True)
class Case:
    """A run's images of one test environment in one degradation and severity.

    standing: of the algorithm, as in its record. accuracy: in percent. mean_bits: over layers with a policy and
    samples; bitops: multiply-accumulates times the bits of both factors, an image; None where the algorithm does not
    quantize.
    """

    dataset: str
    row: str
    standing: str | None
    run: str
    hparams_seed: int
    trial_seed: int
    environment: str
    degradation: str
    severity: int
    samples: int
    accuracy: float
    mean_bits: float | None
    bitops: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A row over its runs and test environments, `n` of them.

    accuracy, bits: by severity, 0 first, means over degradations and runs. correlations: for each run, the mean over
    degradations (and test environments) of Spearman's rho of severity and mean bits; within a degradation, because
    degradations differ in their bits and would hide what each does. 0 where bits do not move; none where no run's do.
    by_degradation: the same by degradation, means over runs.
    """

    dataset: str
    row: str
    standing: str | None
    n: int
    accuracy: dict[int, float]
    bits: dict[int, float]
    correlations: tuple[float, ...]
    by_degradation: dict[str, float]

    def correlation(self) -> str:
        """Mean, standard error and p of a two-sided t-test against 0, in words."""
        if not self.bits:
            return ABSENT
        if not self.correlations:
            return "the bits never move"
        told = f"{fmean(self.correlations):+.2f}"
        if len(self.correlations) == 1:
            return f"{told} (one run)"
        error = stdev(self.correlations) / len(self.correlations) ** 0.5
        p = paired_test(self.correlations).p_t
        return f"{told} ± {error:.2f}" + ("" if p is None else f" (p = {p:.2g})")


def cases_of(input_dir: str | Path, warn: Warn) -> list[Case]:
    """The cases of all finished runs of a directory, row by row as tables have them. Raises UserError where there are
    none."""
    root = Path(input_dir)
    folders = run_folders(root, warn)
    runs = list(_degraded_runs(folders, warn))
    same = alike(method for method, _, _ in runs)
    found: list[tuple[Method, str, Mapping[str, Any]]] = []
    known: dict[tuple[Any, ...], Path] = {}
    seeds: dict[tuple[Method, str], set[int]] = defaultdict(set)
    for spelled, folder, last in runs:
        args, method = last["args"], same[spelled]
        key = (method, args["dataset"], *(str(args[name]) for name in SEEDS))
        if key in known:
            warn(f"{folder} is the same run as {known[key]}, left out")
            continue
        known[key] = folder
        seeds[method, args["dataset"]].add(args["hparams_seed"])
        found.append((method, folder.name, last))
    for (method, dataset), drawn in seeds.items():
        if len(drawn) > 1:
            warn(
                f"{root}: runs of {method.algorithm} on {dataset} have {len(drawn)} hparams seeds, and the table takes "
                "means over them together"
            )
    if not found:
        raise UserError(
            f"--input_dir {root}: no record of its {len(folders)} runs was made on degraded copies; those of the "
            "quantizing algorithms are, and others with hparam degraded_evaluation set to true"
        )
    labels = label_methods((record["args"]["dataset"], method) for method, _, record in found)
    places = {(dataset, method): place for dataset, of in labels.items() for place, method in enumerate(of)}
    found.sort(key=lambda entry: (entry[2]["args"]["dataset"], places[entry[2]["args"]["dataset"], entry[0]]))
    return [
        case for method, run, record in found for case in _cases(labels[record["args"]["dataset"]][method], run, record)
    ]


def _degraded_runs(folders: Iterable[Path], warn: Warn) -> Iterator[tuple[Method, Path, dict[str, Any]]]:
    """Method, folder and last record of each finished run that was evaluated on degraded copies."""
    for folder in folders:
        try:
            last = last_record(folder)
            if last is None or not is_done(folder):
                warn(f"{folder}: not finished, left out")
                continue
            if not any(_FIELD.fullmatch(name) for name in last):
                continue
            args = last["args"]
            method = method_of(args["algorithm"], args.get("hparams"), args.get("steps"), args["dataset"])
            [str(args[name]) for name in SEEDS]
            list(_cases("", "", last))
        except OSError as error:
            raise UserError(f"{folder / RESULTS} cannot be read: {error.strerror or error}") from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder / RESULTS} holds a record that is not one of DomainBed's or ours ({type(error).__name__}: "
                f"{error}); move it out of --input_dir"
            ) from error
        yield method, folder, last


def _cases(row: str, run: str, record: Mapping[str, Any]) -> Iterator[Case]:
    args, names = record["args"], record.get("environments") or []
    for name, value in record.items():
        match = _FIELD.fullmatch(name)
        if not match:
            continue
        env = int(match[1])
        for case in value:
            yield Case(
                args["dataset"],
                row,
                record.get("standing"),
                run,
                args["hparams_seed"],
                args["trial_seed"],
                str(names[env]) if env < len(names) else f"env{env}",
                case["degradation"],
                case["severity"],
                case["samples"],
                100 * case["accuracy"],
                case.get("mean_bits"),
                case.get("bitops"),
            )


def summarise(cases: Iterable[Case]) -> list[Summary]:
    """A summary of each row of each data set, in the order of the cases' labels."""
    rows: dict[tuple[str, str], dict[tuple[str, str], list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        rows[case.dataset, case.row][case.run, case.environment].append(case)
    return [_summary(dataset, row, runs) for (dataset, row), runs in rows.items()]


def _summary(dataset: str, row: str, runs: Mapping[tuple[str, str], Sequence[Case]]) -> Summary:
    # By run, over its environments; by degradation, over runs.
    by_run: dict[str, list[float]] = defaultdict(list)
    by_degradation: dict[str, list[float]] = defaultdict(list)
    told = [(run, correlations(found)) for (run, _), found in runs.items()]
    if any(rho for _, rhos in told for rho in rhos.values()):
        for run, rhos in told:
            for degradation, rho in rhos.items():
                by_run[run].append(rho)
                by_degradation[degradation].append(rho)
    return Summary(
        dataset,
        row,
        next((case.standing for found in runs.values() for case in found), None),
        len(runs),
        _by_severity(runs.values(), "accuracy"),
        _by_severity(runs.values(), "mean_bits"),
        tuple(fmean(rhos) for rhos in by_run.values()),
        {degradation: fmean(rhos) for degradation, rhos in by_degradation.items()},
    )


def _by_severity(runs: Iterable[Sequence[Case]], name: str) -> dict[int, float]:
    values: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for case in run:
            if getattr(case, name) is not None:
                values[case.severity].append(getattr(case, name))
    return {severity: fmean(found) for severity, found in sorted(values.items())}


def correlations(cases: Sequence[Case]) -> dict[str, float]:
    """By degradation, Spearman's rank correlation of severity and mean bits over the cases of a run, the images as they
    are among them; 0 where bits do not move. Empty where there are no bits."""
    from scipy import stats

    clean = [case for case in cases if case.degradation == NONE]
    found = {}
    for degradation in dict.fromkeys(case.degradation for case in cases if case.degradation != NONE):
        here = [*clean, *(case for case in cases if case.degradation == degradation)]
        told = [(case.severity, round(case.mean_bits, 9)) for case in here if case.mean_bits is not None]
        severities, bits = [severity for severity, _ in told], [value for _, value in told]
        if len(set(severities)) > 1:
            found[degradation] = float(stats.spearmanr(severities, bits).statistic) if len(set(bits)) > 1 else 0.0
    return found


def markdown_text(summaries: Sequence[Summary]) -> str:
    """A table a data set: accuracy as they are, and at severities 1, 3 and 5; bits as they are and at 5; rho."""
    blocks = []
    for dataset in dict.fromkeys(summary.dataset for summary in summaries):
        here = [summary for summary in summaries if summary.dataset == dataset]
        severities = sorted({severity for summary in here for severity in summary.accuracy})
        shown = [severity for severity in (0, 1, 3, 5) if severity in severities] or severities
        head = ["Row", *(f"Accuracy, severity {s}" for s in shown), "Bits, severity 0", f"Bits, severity {shown[-1]}"]
        lines = [
            [*head, "Rho of severity and bits", "By degradation", "Runs"],
            ["---", *["--:"] * len(head), "---", "--:"],
        ]
        for summary in here:
            accuracies = [f"{summary.accuracy[s]:.1f}" if s in summary.accuracy else ABSENT for s in shown]
            bits = [f"{summary.bits[s]:.2f}" if s in summary.bits else ABSENT for s in (shown[0], shown[-1])]
            kinds = ", ".join(f"{kind} {rho:+.2f}" for kind, rho in summary.by_degradation.items()) or ABSENT
            lines.append(
                [
                    daggered(summary.row, summary.standing),
                    *accuracies,
                    *bits,
                    summary.correlation(),
                    kinds,
                    str(summary.n),
                ]
            )
        blocks.append(f"### {dataset}, degraded copies of the test environment\n\n" + _table(lines))
    blocks.append(
        "- Accuracy in percent and bits are means over runs and the five degradations (blur, noise, contrast, resize, "
        "JPEG); severity 0: the images as they are. They are those of the finished model on some of the test "
        "environment's images (`samples` of --csv), not of the selected model on all, as in other tables.\n"
        "- Rho: Spearman's rank correlation of severity and mean bits within a degradation, the images as they are "
        "among the cases (0 where bits do not move), mean over degradations; mean ± standard error over runs; p of a "
        "two-sided t-test against 0.\n"
        + (f"- {RECONSTRUCTION_NOTE}\n" if any(s.standing == RECONSTRUCTION for s in summaries) else "")
    )
    return "\n".join(blocks)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def csv_text(cases: Sequence[Case]) -> str:
    """The cases as CSV, unrounded; what an algorithm does not have is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Case)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(case) for case in cases)
    return out.getvalue()


def plot(cases: Sequence[Case], suffix: str) -> bytes:
    """Mean bits against severity for the rows that choose them by the sample, or accuracy where no row does: a panel
    for each row, a line for each degradation, means over runs. UserError without matplotlib."""
    with figure_style():
        return image_bytes(_draw(cases), suffix)


def _draw(cases: Sequence[Case]) -> Figure:
    from matplotlib.figure import Figure

    summaries = summarise(cases)
    names = {(s.dataset, s.row): daggered(s.row, s.standing) for s in summaries}
    moving = {(s.dataset, s.row) for s in summaries if s.correlations}
    name, title = ("mean_bits", "mean bits") if moving else ("accuracy", "accuracy (%)")
    panels = list(dict.fromkeys((case.dataset, case.row) for case in cases))
    panels = [panel for panel in panels if panel in moving or not moving]
    kinds = sorted({case.degradation for case in cases} - {NONE})
    styles: Sequence[Any] = LINES
    figure = Figure(figsize=(3.5 * len(panels), 3.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (dataset, row), axis in zip(panels, axes):
        for index, kind in enumerate(kinds):
            here = [c for c in cases if (c.dataset, c.row) == (dataset, row) and c.degradation in (NONE, kind)]
            points = _by_severity([here], name)
            style = styles[index % len(styles)]
            axis.plot(
                *zip(*points.items()), color=COLOURS[index % len(COLOURS)], linestyle=style, marker=".", label=kind
            )
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set(title=f"{dataset}\n{names[dataset, row]}", xlabel="severity", ylabel=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")  # inside it would hide points
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input_dir", required=True, metavar="DIR", help="the sweep: a directory of runs")
    parser.add_argument("--output", metavar="FILE", help="write the table to FILE instead of the standard output")
    parser.add_argument("--csv", metavar="FILE", help="also write every case: run, degradation, severity")
    parser.add_argument("--plot", metavar="FILE", help=f"also draw bits against severity; {', '.join(SUFFIXES)}")


def run(args: argparse.Namespace) -> int:
    """Writes the table and what else was asked for; returns the exit status. Raises UserError for bad input."""
    suffix = Path(args.plot).suffix.lower() if args.plot else ""
    if args.plot and suffix not in SUFFIXES:
        raise unknown_name("suffix of --plot", suffix or args.plot, SUFFIXES)
    cases = cases_of(args.input_dir, lambda message: print(f"warning: {message}", file=sys.stderr))
    text = markdown_text(summarise(cases))
    image = plot(cases, suffix) if args.plot else None
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_output("--output", args.output, text)
    if args.csv:
        write_output("--csv", args.csv, csv_text(cases))
    if image is not None:
        write_output("--plot", args.plot, image)
    return 0
