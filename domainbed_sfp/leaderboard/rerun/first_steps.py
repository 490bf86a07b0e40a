"""Every run's first step computed again: its accuracies follow from seed, hparams and data, and cost a step."""

from __future__ import annotations

import tempfile

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.documents.problems import Problem
from domainbed_sfp.leaderboard.rerun.comparing import TOLERANCE, compare
from domainbed_sfp.leaderboard.rerun.place import Place, args_of, as_recorded, hours_of, reason_not_to, sizes_of
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation import Validation
from domainbed_sfp.leaderboard.validation.context import records_of
from domainbed_sfp.leaderboard.validation.outcomes import FirstSteps
from domainbed_sfp.training import train as training


def check_first_steps(outcome: Validation, place: Place) -> None:
    """Computes step 0 of all runs, where that can be done here; what disagrees is among the problems then."""
    outcome.step_0 = FirstSteps()
    for dataset in sorted({run.run.dataset for run in outcome.runs}):
        runs = [run for run in outcome.runs if run.run.dataset == dataset]
        reasons = (reason for run in runs if (reason := reason_not_to(run, place)))
        if reason := next(reasons, None):
            outcome.step_0.skipped[dataset] = reason
        elif without := [run for run in runs if run.records[0]["step"]]:
            outcome.step_0.skipped[dataset] = f"{len(without)} of {len(runs)} runs have no record of it"
        elif (hours := hours_of(runs, 1, 1)) > place.hours:
            outcome.step_0.skipped[dataset] = f"it would take about {hours:,.1f} hours; --hours raises the limit"
        else:
            for run in runs:
                outcome.problems += _check(run, place, outcome.step_0)


def _check(run: BundleRun, place: Place, found: FirstSteps) -> list[Problem]:
    try:
        with tempfile.TemporaryDirectory() as folder, as_recorded(run):
            again = training.first_record(args_of(run, place, folder))
    except UserError as error:
        return [Problem(records_of(run), "line 1", "a run that can be trained", str(error))]
    compared = compare(run.name, run.records[:1], [again], TOLERANCE, frozenset(), sizes_of(run))
    found.differences[run.name] = compared.difference
    return compared.problems
