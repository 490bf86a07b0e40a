"""What validation has found, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from domainbed_sfp.leaderboard import tracks
from domainbed_sfp.leaderboard.entries import TIERS
from domainbed_sfp.leaderboard.rerun import Rerun
from domainbed_sfp.leaderboard.schema import Problem, printable
from domainbed_sfp.leaderboard.summary import SubmittedRun


@dataclass
class Validation:
    """The outcome. problems: what must be mended. unchecked: what could not be checked here. unverified: by data set,
    the costs that the records do not determine. submission: the document as recomputed from the records, None where
    they are not fit for it; sums: SHA-256 of SHA256SUMS. rerun: None where nothing was to be computed anew."""

    root: Path
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    unverified: dict[str, list[str]] = field(default_factory=dict)
    submission: dict[str, Any] | None = None
    runs: list[SubmittedRun] = field(default_factory=list)
    sums: str = ""
    rerun: Rerun | None = None

    @property
    def tier(self) -> str | None:
        """None for a bundle with problems; else "self-reported" where a number could not be checked, or
        "records-verified", or "rerun-verified" where a run of every data set was computed anew and agreed."""
        if self.problems or self.submission is None:
            return None
        return min(map(self.tier_of, self.submission["datasets"]), key=TIERS.index)

    def tier_of(self, dataset: str) -> str:
        """The tier of one data set of a bundle without problems."""
        if self.unchecked:
            return TIERS[0]
        return TIERS[1] if self.rerun_of(dataset) is None else TIERS[2]

    def rerun_of(self, dataset: str) -> dict[str, Any] | None:
        """What was computed anew of a data set, as an entry tells it; None where nothing was."""
        names = {one.name for one in self.runs if one.run.dataset == dataset}
        return None if self.rerun is None else self.rerun.document(names)

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
    again = outcome.rerun
    for one in again.agreed if again else ():
        lines.append(printable(f"computed anew: {one.run} {one.agreement} (difference {one.difference:.2f} points)"))
    words = f" (tolerance between machines {again.tolerance:g} points, seed {again.seed})" if again else ""
    lines.append(f"{outcome.root}: {len(outcome.runs)} runs, tier {outcome.tier}{words}.")
    return "\n".join(lines) + "\n"


def json_of(outcome: Validation) -> str:
    """The outcome for programs, one document whether runs were computed anew or not: `rerun` is null where not."""
    again = outcome.rerun
    document = {
        "bundle": str(outcome.root),
        "tier": outcome.tier,
        "problems": [vars(problem) for problem in outcome.problems],
        "unchecked": outcome.unchecked,
        "unverified": outcome.unverified,
        "rerun": again and {"outcome": again.outcome, **asdict(again)},
        "submission": outcome.submission,
    }
    return json.dumps(document, indent=1) + "\n"
