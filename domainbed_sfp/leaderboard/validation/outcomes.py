"""What was computed here of a bundle, beyond what its records show, as an entry tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from domainbed_sfp.leaderboard.documents.entry_schema import AGREEMENTS
from domainbed_sfp.leaderboard.documents.problems import Problem


@dataclass
class Recomputed:
    """A run, or a record of it, and what was computed of it again.

    difference: the largest of an accuracy, in points; selected_difference: over records that a selection rule chose.
    signed: claimed minus computed accuracies of unseen environments, of the validation splits, and of the selected
    records, in points.
    """

    run: str
    agreement: str = AGREEMENTS[0]
    difference: float = 0.0
    selected_difference: float = 0.0
    signed: dict[str, list[float]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class FirstSteps:
    """What came of it. differences: the largest of an accuracy, in points, by run. skipped: why not, by data set."""

    differences: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def document(self, runs: set[str]) -> dict[str, Any] | None:
        """The `step_0` of an entry of these runs; None where they were not all computed."""
        if not runs or not runs <= self.differences.keys():
            return None
        return {"runs": len(runs), "difference": max(self.differences[name] for name in runs)}


@dataclass
class Models:
    """Selected checkpoints evaluated from the weights in the bundle. differences: the largest of an accuracy, in
    points, by run and step; skipped: why not, by data set."""

    differences: dict[tuple[str, int], float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def document(self, checkpoints: set[tuple[str, int]]) -> dict[str, Any] | None:
        """The `models` of an entry that cites these (run, step); None where they were not all evaluated."""
        if not checkpoints or not checkpoints <= self.differences.keys():
            return None
        return {"checkpoints": len(checkpoints), "difference": max(self.differences[one] for one in checkpoints)}


@dataclass
class Rerun:
    """What was trained again. seed: of the draw; per_environment: runs of each test environment; tolerance: points that
    accuracies may differ by on another machine. runs: those drawn, by data set; compared: those that could be trained;
    means: the signed mean difference on unseen environments, by data set."""

    seed: int
    per_environment: int
    tolerance: float
    runs: dict[str, list[str]] = field(default_factory=dict)
    compared: list[Recomputed] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    disagreed: int = 0

    @property
    def outcome(self) -> str:
        """In a word: "not computed" where the records themselves are wrong."""
        if not self.runs:
            return "not computed"
        return "disagreed" if self.disagreed else "agreed"

    def document(self, dataset: str) -> dict[str, Any] | None:
        """The `rerun` of an entry; None where nothing of its data set was trained again, or something disagreed."""
        names = set(self.runs.get(dataset, ()))
        cells = [
            {name: getattr(one, name) for name in ("run", "agreement", "difference", "selected_difference")}
            for one in self.compared
            if one.run in names
        ]
        if self.outcome != "agreed" or not cells:
            return None
        known = {name: getattr(self, name) for name in ("seed", "per_environment", "tolerance")}
        return {**known, "mean_difference": self.means[dataset], "cells": cells}

    def is_identical(self, dataset: str) -> bool:
        """Whether every run of a data set that was trained again was the same bit by bit."""
        again = self.document(dataset)
        return again is not None and all(cell["agreement"] == AGREEMENTS[0] for cell in again["cells"])
