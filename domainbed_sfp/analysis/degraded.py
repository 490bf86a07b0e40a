"""What the last records say of degraded copies of their test environments: accuracy, bit-widths, and whether the
widths move with quality.

Of each run that has them, `training.evaluate_degraded` wrote the numbers for 100 images as they are (severity 0) and in
every degradation and severity (1 to 5).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.methods import Method, alike, label_methods, method_of
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.layout import RESULTS
from domainbed_sfp.runs.packed import run_folders
from domainbed_sfp.runs.records import Warn, is_done, last_record

if TYPE_CHECKING:
    pass

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
class RowOnCopies:
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


def summarise(cases: Iterable[Case]) -> list[RowOnCopies]:
    """A summary of each row of each data set, in the order of the cases' labels."""
    rows: dict[tuple[str, str], dict[tuple[str, str], list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        rows[case.dataset, case.row][case.run, case.environment].append(case)
    return [_summary(dataset, row, runs) for (dataset, row), runs in rows.items()]


def _summary(dataset: str, row: str, runs: Mapping[tuple[str, str], Sequence[Case]]) -> RowOnCopies:
    # By run, over its environments; by degradation, over runs.
    by_run: dict[str, list[float]] = defaultdict(list)
    by_degradation: dict[str, list[float]] = defaultdict(list)
    told = [(run, correlations(found)) for (run, _), found in runs.items()]
    if any(rho for _, rhos in told for rho in rhos.values()):
        for run, rhos in told:
            for degradation, rho in rhos.items():
                by_run[run].append(rho)
                by_degradation[degradation].append(rho)
    return RowOnCopies(
        dataset,
        row,
        next((case.standing for found in runs.values() for case in found), None),
        len(runs),
        by_severity(runs.values(), "accuracy"),
        by_severity(runs.values(), "mean_bits"),
        tuple(fmean(rhos) for rhos in by_run.values()),
        {degradation: fmean(rhos) for degradation, rhos in by_degradation.items()},
    )


def by_severity(runs: Iterable[Sequence[Case]], name: str) -> dict[int, float]:
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
