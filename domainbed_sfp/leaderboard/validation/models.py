"""The models in a bundle are those of its selected checkpoints; `rerun.models` evaluates them."""

from __future__ import annotations

from collections.abc import Iterator

from domainbed_sfp.leaderboard.bundle.layout import MODELS, model_file
from domainbed_sfp.leaderboard.documents.problems import Problem
from domainbed_sfp.leaderboard.validation.context import Bundle
from domainbed_sfp.leaderboard.validation.costs import chosen_checkpoints


def check_models(bundle: Bundle) -> Iterator[Problem]:
    """Where there are any, every selected checkpoint has one, and no other."""
    held = set(bundle.tree.names(MODELS))
    if not held or bundle.document is None:
        return
    chosen = {model_file(run, step) for run, step in chosen_checkpoints(bundle)}
    for name in sorted(held - chosen):
        yield Problem(name, "", "the model of a checkpoint that a selection rule chooses", "another")
    for name in sorted(chosen - held):
        yield Problem(name, "", "a model, as of the other selected checkpoints", "no file")
