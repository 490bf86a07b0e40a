"""Leaderboard entries: one JSON file per method and data set, `<folder>/<dataset>/<Name>.json`.

An entry says what a submission's records show, never what its author claims. Accuracies and standard errors are percent
and unrounded; standard errors are sample ones (ddof = 1) over trials, null with a single trial. The fields:

    format          1
    name            the entry's name, unique on its data set; the file's name is made from it
    dataset         the registered name
    algorithm       the registered name
    settings        hparams the method was given on purpose, name -> value; `name` tells them where rows differ by them
    tier            what was shown of it; tiers are ranked apart, so that none stands above a higher one:
                    "self-reported": something could not be checked, such as an algorithm that is not installed: listed
                        without rank
                    "records-verified": every number but the `unverified` ones follows from the records, and the records
                        from the protocol
                    "model-verified": and the selected checkpoints, which the bundle holds, give these accuracies,
                        masks and costs on the data
                    "rerun-verified": and selected runs, drawn after the bundle was fixed, agreed within tolerance when
                        they were trained again
                    "rerun-identical": and they were the same bit by bit
    track           "closed" (a fixed backbone, weights, steps, checkpoints and data, and three trials or more: see
                    `tracks`) or "open"
    transductive    true where training saw unlabelled images of the test environment: ranked apart
    standing        "reference", "published" or "reconstruction", as registered
    reference       where the method comes from
    protocol        {environments: [names], test_envs: [[numbers]], steps, checkpoint_freq, backbone, weights,
                    image_size (pixels or null), holdout_fraction, precision, task, hparams_seeds, trial_seeds,
                    data_digest (null but for a data set that its name does not determine)}
    results         selection key ("training-domain", "leave-one-out", "oracle") -> {
                        cells: one per environment, null where it was not tested, else
                            {environment, accuracy, std_err, trials: [{trial_seed, accuracy, validation, hparams_seed,
                             step, run}]}      accuracy and validation in percent; run: the job's folder
                        average: {accuracy, std_err} or null where an environment is missing
                        worst: {environment, accuracy} or null where an environment is missing
                        costs: {sparsity, parameters, surviving_parameters, dense_macs, macs, ...}: means over the
                            selected checkpoints; sparsity is a fraction in the method's own units, MACs are per image}
    unverified      names of costs that the records do not determine (the BitOPs of learned bit-widths): they are what
                    the runs say of themselves, whatever the tier, and are marked wherever they are shown
    step_0          null, or {runs, difference}: the first step of that many runs, all of the data set, was computed
                    again; `difference` is the largest of an accuracy, in points
    models          null, or {checkpoints, difference}: so many selected checkpoints, all of the data set, were
                    evaluated from the weights in the bundle
    rerun           null, or {seed, per_environment, tolerance, mean_difference, cells: [{run, agreement: "identical" or
                    "within tolerance", difference, selected_difference}]}: what was trained again. The runs follow from
                    `bundle` and `seed`; `selected_difference` is the largest over records that a rule selected
    runs            digests of the accuracies in the records of its runs: no other entry may have one of them
    author          null, or the public key (Ed25519, 64 hexadecimal digits) whose signature the bundle has: who holds
                    its private part may replace the entry
    archive         null, or where the bundle lies: an https address or a path from the folder of entries, of a folder
                    or a .tgz file; `leaderboard build --check` rebuilds the entry from it
    bundle          SHA-256 of the bundle's SHA256SUMS
    date            of the addition, YYYY-MM-DD
    package         the version of domainbed_sfp that made the records, "domainbed_sfp 0.1.0"
    commit          the commit that made them, or null outside a checkout
    notes           sentences for readers
    superseded_by   null for a current entry; the `bundle` of the entry that took its place for one of the history

Nothing is deleted: an entry that is replaced is kept beside the new one as `<Name>.<k>.json`, k = 1, 2, ... by age; see
`store`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.documents.entry_schema import FORMAT, SCHEMA
from domainbed_sfp.leaderboard.documents.problems import problems_of


@dataclass(frozen=True)
class Trial:
    """What one trial contributes to a cell: the choice over its hparams seeds and checkpoints."""

    trial_seed: int
    accuracy: float
    validation: float
    hparams_seed: int
    step: int
    run: str


@dataclass(frozen=True)
class EntryCell:
    """One test environment under one selection rule."""

    environment: str
    accuracy: float
    std_err: float | None
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Result:
    """A method on a data set under one selection rule. `average` and `worst` are None where an environment is
    missing; `worst` names its environment."""

    cells: tuple[EntryCell | None, ...]
    average: tuple[float, float | None] | None
    worst: tuple[str, float] | None
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard; the module's docstring says what the fields mean."""

    name: str
    dataset: str
    algorithm: str
    settings: Mapping[str, Any]
    tier: str
    track: str
    transductive: bool
    standing: str
    reference: str
    protocol: Mapping[str, Any]
    results: Mapping[str, Result]
    unverified: tuple[str, ...]
    step_0: Mapping[str, Any] | None
    models: Mapping[str, Any] | None
    rerun: Mapping[str, Any] | None
    runs: tuple[str, ...]
    bundle: str
    date: str
    package: str
    commit: str | None
    author: str | None = None
    archive: str | None = None
    notes: tuple[str, ...] = ()
    superseded_by: str | None = None

    @property
    def file_name(self) -> str:
        """The name of the entry's file."""
        return f"{slug(self.name)}.json"


# Fields that are tuples here and lists in JSON.
_LISTS = ("notes", "runs", "unverified")


def slug(name: str) -> str:
    """A name as a file's: "SFP (sparsity=0.7)" as "SFP_sparsity=0.7"."""
    return re.sub("[^A-Za-z0-9.=+-]+", "_", name).strip("_.") or "entry"


def as_json(entry: Entry) -> dict[str, Any]:
    """The entry's JSON document."""
    document = {"format": FORMAT, **asdict(entry)}
    document |= {name: list(getattr(entry, name)) for name in _LISTS}
    document["results"] = {key: result_as_json(result) for key, result in entry.results.items()}
    return document


def result_as_json(result: Result) -> dict[str, Any]:
    """A result as it stands in an entry, and in a bundle's submission.json."""
    return {
        "cells": [
            None if cell is None else {**asdict(cell), "trials": list(map(asdict, cell.trials))}
            for cell in result.cells
        ],
        "average": None if result.average is None else dict(zip(("accuracy", "std_err"), result.average)),
        "worst": None if result.worst is None else dict(zip(("environment", "accuracy"), result.worst)),
        "costs": dict(result.costs),
    }


def result_from_json(document: Mapping[str, Any]) -> Result:
    """The opposite of `result_as_json`, for a document that RESULT_SCHEMA accepts."""
    average, worst = document["average"], document["worst"]
    return Result(
        tuple(
            None if cell is None else EntryCell(**{**cell, "trials": tuple(Trial(**trial) for trial in cell["trials"])})
            for cell in document["cells"]
        ),
        None if average is None else (average["accuracy"], average["std_err"]),
        None if worst is None else (worst["environment"], worst["accuracy"]),
        document["costs"],
    )


def from_json(document: Any, file: str = "entry") -> Entry:
    """The entry of a JSON document. Raises UserError, naming file and field, where it does not keep the schema; whether
    it contradicts itself, `consistency` knows."""
    for problem in problems_of(file, document, SCHEMA):
        raise UserError(problem.line())
    fields = {name: value for name, value in document.items() if name != "format"}
    fields |= {name: tuple(document[name]) for name in _LISTS}
    fields["results"] = {key: result_from_json(result) for key, result in document["results"].items()}
    return Entry(**fields)


def text_of(entry: Entry) -> str:
    """The entry's file. Raises UserError where it does not keep the schema."""
    from_json(document := as_json(entry), entry.name)
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
