"""The runs together: one method, one protocol, every job of the grid once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from domainbed_sfp.leaderboard import summary
from domainbed_sfp.leaderboard.bundle import layout as layout
from domainbed_sfp.leaderboard.bundle.layout import RECORDS, SUBMISSION
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of


def check_jobs(bundle: Bundle) -> Iterator[Problem]:
    """No job is there twice."""
    jobs: dict[tuple[Any, ...], str] = {}
    for run in bundle.runs:
        if run.job in jobs:
            words = f"a job that no other file holds (data set, test environments, hparams and trial seed: {run.job})"
            yield Problem(records_of(run), "line 1.args", words, f"that of {jobs[run.job]}")
        jobs.setdefault(run.job, records_of(run))


def check_file_names(bundle: Bundle) -> Iterator[Problem]:
    """No two files differ by capitals alone: some disks would keep one of them."""
    seen: dict[str, str] = {}
    for name in sorted(bundle.tree.sums):
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            yield Problem(name, "", f"a name that differs from {other} by more than capitals", "the same letters")


def check_copies(bundle: Bundle) -> Iterator[Problem]:
    """No run is another's under a new name: trials split the samples anew, and every job has a seed of its own. A run
    whose numbers never move is let pass: a network that has collapsed can give the same ones twice."""
    seen: dict[tuple[Any, ...], BundleRun] = {}
    for run in bundle.runs:
        accuracies = [(*inner, *outer) for inner, outer in zip(run.run.in_acc.tolist(), run.run.out_acc.tolist())]
        losses = [(record.get("loss"),) for record in run.records]
        for name, rows in (("accuracies", accuracies), ("loss", losses)):
            if len(set(rows)) < 2:
                continue
            other = seen.setdefault((run.run.dataset, run.run.test_envs, name, *rows), run)
            if other.job != run.job:
                words = f"numbers of its own, not all those of {records_of(other)}, another run's"
                yield Problem(records_of(run), name, words, "the same in every record")


def check_method(bundle: Bundle) -> Iterator[Problem]:
    """One algorithm with one set of overrides in all runs."""
    for run in bundle.runs:
        first = bundle.runs[0]
        for name in ("algorithm", "hparams", "uda_holdout_fraction"):
            if run.run.args[name] != first.run.args[name]:
                words = f"{shown(first.run.args[name])} as in {records_of(first)}"
                yield Problem(records_of(run), f"line 1.args.{name}", words, shown(run.run.args[name]))


def check_grid(bundle: Bundle) -> Iterator[Problem]:
    """One protocol for all runs of a data set, and a run for every job of it."""
    claimed = {} if bundle.claimed is None else bundle.claimed["datasets"]
    jobs = {run.job for run in bundle.runs}
    for dataset in sorted({run.run.dataset for run in bundle.runs} | set(claimed)):
        here = [run for run in bundle.runs if run.run.dataset == dataset]
        grids = [{**claimed[dataset]["protocol"], "where": SUBMISSION}] if dataset in claimed else []
        if here:
            yield from _differing_conditions([run for run in here if run.name not in bundle.unfit])
            grids.append({**_grid(here), "where": RECORDS})
        yield from _missing_jobs(dataset, grids, jobs)


def _grid(runs: Sequence[BundleRun]) -> dict[str, Any]:
    return {
        "environments": runs[0].records[0]["environments"],
        "test_envs": sorted({run.run.test_envs for run in runs}),
        "hparams_seeds": sorted({run.run.hparams_seed for run in runs}),
        "trial_seeds": sorted({run.run.trial_seed for run in runs}),
    }


def _differing_conditions(runs: Sequence[BundleRun]) -> Iterator[Problem]:
    for run in runs:
        expected = summary.conditions(runs[0].run)
        for name, value in summary.conditions(run.run).items():
            if value != expected[name]:
                words = f"{shown(expected[name])} as in {records_of(runs[0])}"
                yield Problem(records_of(run), f"protocol, {name}", words, shown(value))


def _missing_jobs(
    dataset: str, grids: Sequence[Mapping[str, Any]], jobs: set[tuple[str, tuple[int, ...], int, int]]
) -> Iterator[Problem]:
    """All test environments x hparams seeds x trial seeds are there, and the seeds begin at 0: none was chosen."""
    axes: dict[str, set[Any]] = {"test_envs": set(), "hparams_seeds": set(), "trial_seeds": set()}
    for grid in grids:
        axes["test_envs"] |= {tuple(envs) for envs in grid["test_envs"]}
        for name in ("hparams_seeds", "trial_seeds"):
            axes[name] |= set(grid[name])
            if sorted(grid[name]) != (whole := list(range(len(grid[name])))):
                of_claim = grid["where"] == SUBMISSION
                where = f"datasets.{dataset}.protocol.{name}" if of_claim else f"{dataset}, {name}"
                yield Problem(grid["where"], where, f"{shown(whole)}: all from 0 on", shown(grid[name]))
    environments = len(grids[0]["environments"])
    if any(len(envs) == 2 for envs in axes["test_envs"]):
        axes["test_envs"] |= {(i, j) for i in range(environments) for j in range(i + 1, environments)}
        axes["test_envs"] |= {(i,) for i in range(environments)}
    if math.prod(map(len, axes.values())) > layout.MOST_FILES:
        yield Problem(SUBMISSION, f"datasets.{dataset}.protocol", f"at most {layout.MOST_FILES:,} runs", "more")
        return
    for envs, hparams_seed, trial_seed in product(*(sorted(axis) for axis in axes.values())):
        if (dataset, envs, hparams_seed, trial_seed) not in jobs:
            words = f"a run with test_envs {list(envs)}, hparams_seed {hparams_seed}, trial_seed {trial_seed}"
            yield Problem(RECORDS, f"{dataset}, the grid", words, "none")
