"""What validation has found, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import tracks
from domainbed_sfp.leaderboard.bundle.tree import Tree
from domainbed_sfp.leaderboard.documents.problems import Problem, printable
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.tiers import (
    MODEL_VERIFIED,
    RECORDS_VERIFIED,
    RERUN_IDENTICAL,
    RERUN_VERIFIED,
    SELF_REPORTED,
    TIERS,
)
from domainbed_sfp.leaderboard.validation.outcomes import FirstSteps, Models, Rerun


@dataclass
class Validation:
    """The outcome. problems: what must be mended. unchecked: what could not be checked here. unverified: by data set,
    the costs that the records do not determine. submission: the document as recomputed from the records, None where
    they are not fit for it; sums: SHA-256 of SHA256SUMS; tree: its files. step_0, models, rerun: what was computed
    here, None where nothing was to be."""

    root: Path
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    unverified: dict[str, list[str]] = field(default_factory=dict)
    submission: dict[str, Any] | None = None
    runs: list[BundleRun] = field(default_factory=list)
    sums: str = ""
    tree: Tree | None = None
    step_0: FirstSteps | None = None
    models: Models | None = None
    rerun: Rerun | None = None

    @property
    def tier(self) -> str | None:
        """None for a bundle with problems; else the lowest of its data sets'."""
        if self.problems or self.submission is None:
            return None
        return min(map(self.tier_of, self.submission["datasets"]), key=TIERS.index)

    def tier_of(self, dataset: str) -> str:
        """The tier of one data set of a bundle without problems: see `entries`."""
        if self.unchecked:
            return SELF_REPORTED
        if self.rerun is not None and self.rerun.document(dataset):
            return RERUN_IDENTICAL if self.rerun.is_identical(dataset) else RERUN_VERIFIED
        return MODEL_VERIFIED if self.computed(dataset)["models"] else RECORDS_VERIFIED

    def computed(self, dataset: str) -> dict[str, Any]:
        """What was computed here of a data set, as an entry tells it: `step_0`, `models` and `rerun`, None each where
        nothing was, or not all."""
        runs = {one.name for one in self.runs if one.run.dataset == dataset}
        return {
            "step_0": self.step_0 and self.step_0.document(runs),
            "models": self.models and self.models.document(self.cited(dataset)),
            "rerun": self.rerun and self.rerun.document(dataset),
        }

    def cited(self, dataset: str) -> set[tuple[str, int]]:
        """(run, step) of the checkpoints that a data set's results cite."""
        results = {} if self.submission is None else self.submission["datasets"][dataset]["results"]
        cells = [cell for result in results.values() for cell in result["cells"] if cell]
        return {(trial["run"], trial["step"]) for cell in cells for trial in cell["trials"]}

    def reasons_for_open(self, dataset: str) -> list[str]:
        """Why the submission is not of the closed track on a data set; empty where it is."""
        if self.submission is None:
            raise ValueError("a bundle that cannot be read has no track")
        runs = [one.run for one in self.runs if one.run.dataset == dataset]
        return list(tracks.reasons_for_open(dataset, self.submission["datasets"][dataset]["protocol"], runs))


def text_of(outcome: Validation, limit: int = 200) -> str:
    """The outcome for people."""
    lines = [problem.line() for problem in outcome.problems[:limit]]
    if len(outcome.problems) > limit:
        lines.append(f"... and {len(outcome.problems) - limit:,} more problems")
    lines += [printable(f"not checked: {what}") for what in outcome.unchecked]
    document = outcome.submission
    if outcome.tier is None or document is None:
        count = len(outcome.problems)
        lines.append(f"{outcome.root}: rejected, {count:,} problem{'s' * (count != 1)}.")
        return "\n".join(lines) + "\n"
    kinds = "transductive, " if document["transductive"] else ""
    for dataset, one in document["datasets"].items():
        if names := outcome.unverified.get(dataset):
            lines.append(printable(f"not recomputed on {dataset}, and marked so: {', '.join(names)}"))
        reasons = outcome.reasons_for_open(dataset)
        track = f"open track ({'; '.join(reasons)})" if reasons else "closed track"
        lines.append(printable(f"{document['name']} on {dataset}: {kinds}{track}."))
        for rule, result in one["results"].items():
            cells = [f"{cell['environment']} {cell['accuracy']:.1f}" for cell in result["cells"] if cell is not None]
            average = result["average"]
            mean = f"; average {average['accuracy']:.1f}" if average else ""
            lines.append(printable(f"    {rule}: {', '.join(cells)}{mean}"))
    lines += map(printable, _computed_lines(outcome))
    lines.append(f"{outcome.root}: {len(outcome.runs)} runs, tier {outcome.tier}.")
    return "\n".join(lines) + "\n"


def _computed_lines(outcome: Validation) -> Iterator[str]:
    """What was computed here, and what was not and why."""
    for title, found in (("step 0", outcome.step_0), ("models", outcome.models)):
        if found is None:
            continue
        if found.differences:
            largest = max(found.differences.values())
            yield f"{title}: {len(found.differences)} computed again, difference at most {largest:.2f} points"
        for dataset, reason in found.skipped.items():
            yield f"{title}: not computed on {dataset}: {reason}"
    if (again := outcome.rerun) is None:
        return
    for one in again.compared:
        words = f"{one.difference:.2f} points, {one.selected_difference:.2f} where a rule selected"
        yield f"trained again: {one.run} {one.agreement} (difference at most {words})"
    for dataset, mean in again.means.items():
        words = f"mean difference {mean:+.2f} points on unseen environments"
        yield f"trained again on {dataset}: {words}, seed {again.seed}"


def json_of(outcome: Validation) -> str:
    """The outcome for programs, one document whether runs were computed anew or not: `rerun` is null where not."""
    again = outcome.rerun
    datasets = outcome.submission["datasets"] if outcome.submission else ()
    document = {
        "bundle": str(outcome.root),
        "tier": outcome.tier,
        "problems": [vars(problem) for problem in outcome.problems],
        "unchecked": outcome.unchecked,
        "unverified": outcome.unverified,
        "computed": {dataset: outcome.computed(dataset) for dataset in datasets},
        "skipped": {
            name: found.skipped for name in ("step_0", "models") if (found := getattr(outcome, name)) is not None
        },
        "rerun": again and {"outcome": again.outcome, **_rerun_json(again)},
        "submission": outcome.submission,
    }
    return json.dumps(document, indent=1) + "\n"


def refusal_json(bundle: str, error: UserError) -> str:
    """The document of `json_of` where there is nothing to validate: the error as its only problem."""
    problem = Problem(bundle, "", "a bundle and flags with which it can be validated", str(error))
    return json_of(Validation(Path(bundle), [problem]))


def _rerun_json(again: Rerun) -> dict[str, Any]:
    document = asdict(again)
    for one in document["compared"]:
        one["problems"] = len(one["problems"])
        del one["signed"]
    return document
