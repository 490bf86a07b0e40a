"""Cited runs of a bundle trained again, and compared with what it says of them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.documents.problems import Problem
from domainbed_sfp.leaderboard.rerun.comparing import check_means, compare
from domainbed_sfp.leaderboard.rerun.drawing import draw
from domainbed_sfp.leaderboard.rerun.place import Place, args_of, as_recorded, here, hours_of, reason_not_to, sizes_of
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation import Validation
from domainbed_sfp.leaderboard.validation.context import records_of
from domainbed_sfp.leaderboard.validation.outcomes import Recomputed, Rerun
from domainbed_sfp.runs.layout import RESULTS
from domainbed_sfp.training import train as training


def train_again(outcome: Validation, again: Rerun, place: Place) -> None:
    """Trains the runs that `again` draws; what disagrees is among the problems then. A run that cannot be trained is
    one of them, and the others go on.

    Raises UserError where nothing can be trained here, or it would take longer than `place` allows.
    """
    if outcome.submission is None:
        raise UserError(f"{outcome.root} has problems; `leaderboard validate` says which")
    by_name = {run.name: run for run in outcome.runs}
    chosen: dict[str, list[str]] = {}
    steps: dict[str, set[int]] = {}
    for dataset, one in outcome.submission["datasets"].items():
        cited = _cited(one["results"], steps)
        chosen[dataset] = draw(cited, again.per_environment, outcome.sums, again.seed)
    runs = [by_name[name] for names in chosen.values() for name in names]
    for run in runs:
        if reason := reason_not_to(run, place):
            raise UserError(f"--rerun: {reason}")
    if (hours := hours_of(runs, None, None)) > place.hours:
        raise UserError(
            f"--rerun: {len(runs)} runs would take about {hours:,.1f} hours here, --hours allows {place.hours:g}; "
            "raise it where you trust their number of steps"
        )
    again.runs = chosen
    _tell(
        f"Training {len(runs)} of {len(outcome.runs)} runs again, drawn by the bundle's digest {outcome.sums[:12]} and "
        f"--rerun_seed {again.seed}, in about {hours:,.2f} hours: {here()}"
    )
    for dataset, names in chosen.items():
        compared, before = [], len(outcome.problems)
        for name in names:
            run = by_name[name]
            _tell(f"    {name}: {dataset} {run.run.algorithm} {run.job[1:]}")
            one = _compute(run, place, again.tolerance, frozenset(steps[name]))
            compared.append(one)
            outcome.problems += one.problems
        again.means[dataset], problems = check_means(compared, again.tolerance)
        outcome.problems += problems
        again.compared += compared
        again.disagreed += len(outcome.problems) - before


def _compute(run: BundleRun, place: Place, tolerance: float, selected: frozenset[int]) -> Recomputed:
    try:
        with tempfile.TemporaryDirectory() as folder:
            with as_recorded(run):
                training.train(args_of(run, place, folder))
            lines = (Path(folder) / RESULTS).read_text(encoding="utf-8").splitlines()
    except (UserError, RuntimeError, ValueError) as error:
        failed = Problem(records_of(run), "", "a run that can be trained", str(error) or type(error).__name__)
        return Recomputed(run.name, problems=[failed])
    return compare(run.name, run.records, [json.loads(line) for line in lines], tolerance, selected, sizes_of(run))


def _cited(results: Mapping[str, Any], steps: dict[str, set[int]]) -> dict[str, set[str]]:
    """The runs that results cite, by test environment; the steps they cite go into `steps`."""
    cited: dict[str, set[str]] = {}
    for result in results.values():
        for cell in filter(None, result["cells"]):
            for trial in cell["trials"]:
                cited.setdefault(cell["environment"], set()).add(trial["run"])
                steps.setdefault(trial["run"], set()).add(trial["step"])
    return cited


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
