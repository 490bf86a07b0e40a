"""The models of selected checkpoints in a bundle, evaluated without training anything."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.bundle.layout import MODELS, model_file
from domainbed_sfp.leaderboard.bundle.tree import Tree
from domainbed_sfp.leaderboard.bundle.weights import unpack
from domainbed_sfp.leaderboard.documents.problems import Problem
from domainbed_sfp.leaderboard.rerun.comparing import compare_model
from domainbed_sfp.leaderboard.rerun.place import Place, args_of, as_recorded, hours_of, reason_not_to, sizes_of
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation import Validation
from domainbed_sfp.leaderboard.validation.outcomes import Models
from domainbed_sfp.training import train as training


def check_models(outcome: Validation, tree: Tree, place: Place) -> None:
    """Evaluates the models that the bundle has, where that can be done here; what disagrees is among the problems
    then, and costs that nothing but the model determines are no longer unverified."""
    outcome.models = Models()
    held = set(tree.names(MODELS))
    for dataset in sorted({run.run.dataset for run in outcome.runs}):
        cited = outcome.cited(dataset)
        runs = [run for run in outcome.runs if run.name in {name for name, _ in cited}]
        if not any(model_file(*one) in held for one in cited):
            continue
        reasons = (reason for run in runs if (reason := reason_not_to(run, place)))
        if reason := next(reasons, None):
            outcome.models.skipped[dataset] = reason
        elif (hours := hours_of(runs, 0, len(cited) // len(runs) + 1)) > place.hours:
            outcome.models.skipped[dataset] = f"it would take about {hours:,.1f} hours; --hours raises the limit"
        else:
            before = len(outcome.problems)
            for run in runs:
                for number, record in enumerate(run.records, start=1):
                    if (run.name, record["step"]) in cited:
                        outcome.problems += _check(run, number, tree, place, outcome.models)
            if len(outcome.problems) == before and outcome.models.document(cited):
                outcome.unverified[dataset] = []


def _check(run: BundleRun, number: int, tree: Tree, place: Place, found: Models) -> Iterator[Problem]:
    record = run.records[number - 1]
    file = model_file(run.name, record["step"])
    try:
        with tempfile.TemporaryDirectory() as folder, as_recorded(run):
            again = training.measure_model(args_of(run, place, folder), record["step"], unpack(tree.read(file)))
    except ValueError as error:
        yield Problem(file, "", "a model, as tensors", f"not a file of a model ({error})")
        return
    except UserError as error:
        yield Problem(file, "", f"the model of {run.run.algorithm}, which can be evaluated", str(error))
        return
    compared = compare_model(run.name, number, record, again, sizes_of(run))
    found.differences[run.name, record["step"]] = compared.difference
    yield from compared.problems
