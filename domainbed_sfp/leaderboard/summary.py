"""What records say: protocol, results and all else of a submission, computed alike by its author and its judge."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domainbed_sfp.algorithms import registry
from domainbed_sfp.analysis.account import Account, JobKey
from domainbed_sfp.analysis.methods import Method
from domainbed_sfp.analysis.protocol import conditions_of
from domainbed_sfp.analysis.report import build_report
from domainbed_sfp.analysis.rows import Row
from domainbed_sfp.analysis.selection import RULES, Choice
from domainbed_sfp.core.overrides import recorded_overrides
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard import names
from domainbed_sfp.leaderboard.documents.bundle_schema import FORMAT, OPTIONAL
from domainbed_sfp.leaderboard.documents.entry import EntryCell, Result, Trial, result_as_json
from domainbed_sfp.runs.records import Run


@dataclass(frozen=True)
class BundleRun:
    """A run of a bundle: its file's name without the suffix, its records as parsed and as columns."""

    name: str
    records: Sequence[Mapping[str, Any]]
    run: Run

    @property
    def job(self) -> tuple[str, tuple[int, ...], int, int]:
        """(data set, test environments, hparams seed, trial seed): unique in a bundle."""
        run = self.run
        return run.dataset, run.test_envs, run.hparams_seed, run.trial_seed


def digests_of(runs: Sequence[BundleRun]) -> list[str]:
    """What tells runs from others whatever they are called: SHA-256 of each one's accuracies on what it trained on, in
    all records, sorted. They decide nothing, so that who raises others leaves them. A run in which they never move is
    left out: networks that have collapsed can give the same ones."""
    found = set()
    for run in runs:
        rows = np.delete(run.run.in_acc, run.run.test_envs, axis=1).tolist()
        if any(row != rows[0] for row in rows):
            told = json.dumps([run.run.dataset, run.run.test_envs, run.run.steps, rows])
            found.add(hashlib.sha256(told.encode()).hexdigest())
    return sorted(found)


def wrong_name(name: str, runs: Sequence[Run]) -> tuple[str, str] | None:
    """What is expected of the name of a row with these runs and what is found, None where it is right."""
    settings: dict[str, list[Any]] = {}
    for one in runs:
        facts = {**one.args, **conditions(one), **one.hparams}
        for key, value in facts.items():
            if value not in (values := settings.setdefault(key, [])):
                values.append(value)
    return names.wrong_name(name, runs[0].algorithm, registry.names(), settings)


def document_of(name: str, runs: Sequence[BundleRun], claimed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The submission.json of runs of one method.

    What only the registry knows is taken from `claimed` where the algorithm is not registered here; without it, that is
    a UserError.
    """
    first = runs[0]
    if claimed is not None and first.run.algorithm not in registry.names():
        described = {name: claimed[name] for name in ("transductive", "standing", "reference")}
    else:
        info = registry.get(first.run.algorithm)
        described = {
            "transductive": is_transductive(info, first.run.args["task"]),
            "standing": info.standing,
            "reference": info.reference,
        }
    datasets = sorted({submitted.run.dataset for submitted in runs})
    made = {json.dumps(record["environment"], sort_keys=True) for one in runs for record in one.records}
    packages = Counter(record["environment"]["domainbed_sfp"] for one in runs for record in one.records)
    commits = Counter(record["commit"] for one in runs for record in one.records)
    return {
        "format": FORMAT,
        "name": name,
        "algorithm": first.run.algorithm,
        "settings": recorded_overrides(first.run.args["hparams"]),
        **described,
        "datasets": {
            dataset: {
                "protocol": protocol_of([one.run for one in runs if one.run.dataset == dataset]),
                "results": {
                    key: result_as_json(result)
                    for key, (result, _) in results_of([one.run for one in runs if one.run.dataset == dataset]).items()
                },
            }
            for dataset in datasets
        },
        "environments": [json.loads(text) for text in sorted(made)],
        "package": f"domainbed_sfp {packages.most_common(1)[0][0]}",
        "commit": commits.most_common(1)[0][0],
        **{name: claimed[name] for name in OPTIONAL if claimed and name in claimed},
    }


def is_transductive(info: registry.AlgorithmInfo, task: str) -> bool:
    """Whether a method, or the task it was run in, shows it unlabelled images of the test environment."""
    return bool(getattr(info.cls, "transductive", False)) or task == "domain_adaptation"


def conditions(run: Run) -> dict[str, Any]:
    """The part of the protocol that all runs of a data set share."""
    found = conditions_of(run)
    return {
        "environments": list(run.facts["environments"]),
        "steps": run.args["steps"] or get_dataset_class(run.dataset).N_STEPS,
        "checkpoint_freq": run.args["checkpoint_freq"] or get_dataset_class(run.dataset).CHECKPOINT_FREQ,
        "backbone": found.backbone,
        "weights": found.weights,
        "image_size": found.image_size,
        "holdout_fraction": found.holdout_fraction,
        "precision": found.precision,
        "task": found.task,
        "data_digest": run.facts["data_digest"],
    }


def protocol_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The protocol of a data set's runs: the conditions of the first, and the grid that all span."""
    return {
        **conditions(runs[0]),
        "test_envs": [
            list(envs) for envs in sorted({run.test_envs for run in runs}, key=lambda envs: (len(envs), envs))
        ],
        "hparams_seeds": sorted({run.hparams_seed for run in runs}),
        "trial_seeds": sorted({run.trial_seed for run in runs}),
    }


def results_of(runs: Sequence[Run]) -> dict[str, tuple[Result, list[Choice]]]:
    """The result of a data set's runs under every selection rule that they allow, with the checkpoints chosen."""
    account = Account()
    for run in runs:
        final = run.final.nonzero()[0].tolist()
        # One method for all: where settings differ, that is told elsewhere.
        method = Method(run.algorithm, ())
        if final:
            account.runs[JobKey(run.dataset, method, run.test_envs, run.hparams_seed, run.trial_seed)] = run.at(final)
    found = {}
    for table in build_report(account, RULES).tables:
        if table.sources:  # runs that no protocol of the leaderboard has
            continue
        (row,) = table.rows
        if any(row.cells):
            choices = [choice for cell in row.cells if cell for _, choice in cell.choices]
            found[table.rule.key] = _result(row, table.environments), choices
    return found


def _result(row: Row, environments: Sequence[str]) -> Result:
    cells: list[EntryCell | None] = []
    for environment, cell in zip(environments, row.cells):
        if cell is None:
            cells.append(None)
            continue
        trials = tuple(
            Trial(
                trial,
                100 * choice.test,
                100 * choice.validation,
                choice.run.hparams_seed,
                choice.run.steps[choice.checkpoint],
                choice.run.directory,
            )
            for trial, choice in cell.choices
        )
        cells.append(EntryCell(environment, cell.accuracy, cell.std_err, trials))
    average = None if row.average is None else (row.average.accuracy, row.average.std_err)
    worst = None
    if row.worst is not None and (lowest := cells[row.worst]) is not None:
        worst = (lowest.environment, lowest.accuracy)
    return Result(tuple(cells), average, worst, dict(row.costs))
