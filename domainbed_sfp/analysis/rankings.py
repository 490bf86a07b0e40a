"""How far samples' channel rankings agree with the global one, over the steps of GlobalPru's runs: CSV and a plot.

A row is what a record says of an environment: means of the measurements since the record before, over samples and
layers. The first row of a run begins at the vote, before the rank loss sets in; the last ends before channels go. How
near to the two moments they are is a matter of --checkpoint_freq.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_sfp.analysis.methods import method_of, plain_number
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.layout import RESULTS
from domainbed_sfp.runs.packed import run_folders
from domainbed_sfp.runs.records import Warn, read_records

if TYPE_CHECKING:
    pass

TAU, OVERLAP = "rank_tau_env", "rank_overlap_env"

# The hparams by which runs in one plot differ.
SETTINGS = ("rank_loss", "rank_weight", "voting", "sparsity")
COLUMNS = (
    "run", "dataset", "test_envs", "hparams_seed", "trial_seed", *SETTINGS, "step", "environment", "tau", "overlap",
)  # fmt: skip

Row = dict[str, Any]


def agreement_rows(input_dir: str | Path, warn: Warn) -> list[Row]:
    """A row of COLUMNS for every environment of every record with agreement, in the order of runs and records.

    Training environments have the names that the record gives them, or `env{i}` where it gives none (DomainBed's own).
    Raises UserError where `input_dir` is no directory of runs, or none of its records tells an agreement.
    """
    root = Path(input_dir)
    folders = run_folders(root, warn)
    rows: list[Row] = []
    methods: dict[tuple[Any, ...], dict[str, Any]] = {}
    for folder in folders:
        try:
            for record in read_records(folder, warn):
                found = list(_rows(folder.name, record))
                rows += found
                for key in {_line(row)[:-1] for row in found}:
                    method = _method(record["args"])
                    if (other := methods.setdefault(key, method)) != method:
                        methods[key] = method  # each is told once
                        one, two = method.items() - other.items(), other.items() - method.items()
                        warn(
                            f"{folder}: this run and others of the same {', '.join(SETTINGS)} differ beyond these "
                            f"({_told(one)} and {_told(two)}): the plot takes means over them together"
                        )
        except OSError as error:
            raise UserError(f"{folder / RESULTS} cannot be read: {error.strerror or error}") from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / RESULTS} holds a record that is not one of DomainBed's or ours ({type(error).__name__}: "
                f"{error}); move it out of --input_dir"
            ) from error
    if not rows:
        raise UserError(
            f"--input_dir {root}: no record of its {len(folders)} runs tells how far rankings agree; GlobalPru's do, "
            "between the vote and the first pruning (hparams vote_at, prune_start; --checkpoint_freq, --evaluate all)"
        )
    return rows


def _method(args: Mapping[str, Any]) -> dict[str, Any]:
    """All by which a run's method may differ from another's, by name."""
    method = method_of(args["algorithm"], args.get("hparams"), args.get("steps"), args["dataset"])
    return {**{name: plain_number(text) for name, text in method.settings}, "hparams_seed": args["hparams_seed"]}


def _rows(run: str, record: Mapping[str, Any]) -> Iterator[Row]:
    args, hparams = record["args"], record["hparams"]
    test_envs = args["test_envs"]
    total = sum(f"env{i}_in_acc" in record for i in range(len(record)))
    names = record.get("environments") or [f"env{i}" for i in range(total)]
    training = [name for index, name in enumerate(names) if index not in test_envs]
    for index, environment in enumerate(training):
        if f"{TAU}{index}" in record:
            yield {
                "run": run,
                "dataset": args["dataset"],
                "test_envs": " ".join(str(names[env]) for env in test_envs),
                "hparams_seed": args["hparams_seed"],
                "trial_seed": args["trial_seed"],
                **{name: hparams.get(name) for name in SETTINGS},
                "step": record["step"],
                "environment": environment,
                "tau": record[f"{TAU}{index}"],
                "overlap": record.get(f"{OVERLAP}{index}"),
            }


def mean_over_trials(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[tuple[int, float]]]:
    """[(step, mean tau)] by (dataset, test environments, *SETTINGS, environment)."""
    collected: dict[tuple[Any, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        collected[_line(row)][row["step"]].append(row["tau"])
    return {
        key: [(step, sum(taus) / len(taus)) for step, taus in sorted(steps.items())] for key, steps in collected.items()
    }


def _told(settings: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(settings)) or "defaults"


def _line(row: Row) -> tuple[Any, ...]:
    """(dataset, test environments, *SETTINGS, environment): what is one line of the plot."""
    return (row["dataset"], row["test_envs"], *(row[name] for name in SETTINGS), row["environment"])
