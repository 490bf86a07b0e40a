"""Objectives against DomainBed's own updates, and against small cases computed by hand."""

from __future__ import annotations

import pytest
import torch
from golden.make_objective_updates import CLASSES, DOMAINS, INPUT_SHAPE, OVERRIDES, trace

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.objectives.coral import coral_distance
from domainbed_sfp.algorithms.objectives.irm import irm_penalty
from domainbed_sfp.training.hparams import resolve_hparams


@pytest.mark.parametrize("name", OVERRIDES)
def test_updates_equal_domainbeds(golden, name):
    """Same weights, same batches, same seeds: the same losses and the same weights after five updates, which include
    the step at which a penalty sets in and Adam restarts."""
    expected = golden("objective_updates.json")[name]
    hparams = resolve_hparams(name, "RotatedMNIST", overrides=OVERRIDES[name])
    ours = trace(registry.get(name).cls(INPUT_SHAPE, CLASSES, DOMAINS, hparams))
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-8)
    assert ours["parameters"].keys() == expected["parameters"].keys()
    for parameter, values in expected["parameters"].items():
        assert ours["parameters"][parameter] == pytest.approx(values, rel=1e-7, abs=1e-9), parameter


def test_the_golden_updates_tell_objectives_apart(golden):
    losses = {name: tuple(values["losses"]) for name, values in golden("objective_updates.json").items()}
    assert len(set(losses.values())) == len(losses)


def test_irm_penalty_by_finite_differences():
    """The penalty is the product of the two half-batch derivatives of the risk in a scale on the logits."""
    torch.manual_seed(0)
    logits, y = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 1, 0])

    def risk(scale: float, half: int) -> float:
        return torch.nn.functional.cross_entropy(logits[half::2] * scale, y[half::2]).item()

    slopes = [(risk(1 + 1e-5, half) - risk(1 - 1e-5, half)) / 2e-5 for half in (0, 1)]
    assert irm_penalty(logits, y).item() == pytest.approx(slopes[0] * slopes[1], rel=1e-6)


def test_coral_distance_by_hand():
    a = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # mean (1, 0), covariance [[2, 0], [0, 0]]
    b = torch.tensor([[1.0, 1.0], [1.0, 3.0]])  # mean (1, 2), covariance [[0, 0], [0, 2]]
    assert coral_distance(a, b).item() == pytest.approx((0 + 4) / 2 + (4 + 0 + 0 + 4) / 4)
