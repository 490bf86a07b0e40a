"""Gates and the projection onto a budget, by hand and against a quadratic programme."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_runs import make
from scipy.optimize import minimize

from domainbed_sfp.pruning.gates import (
    binary_concrete,
    gated_weights,
    log_odds,
    logistic_noise,
    projection_shift,
    straight_through,
)
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.state import Gates

# gates ----------------------------------------------------------------------------------------------------------------


def test_straight_through_is_binary_and_has_the_relaxations_gradient():
    logits = torch.tensor([2.0, -0.5, 0.3], requires_grad=True)
    noise = torch.tensor([-2.5, 1.0, 0.1])
    mask = straight_through(logits, noise)
    assert mask.tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)
    (mask * torch.tensor([3.0, 5.0, -2.0])).sum().backward()
    expected = []
    for logit, n, outer in zip((2.0, -0.5, 0.3), (-2.5, 1.0, 0.1), (3.0, 5.0, -2.0)):
        p = 1 / (1 + math.exp(-(logit + n)))
        expected.append(outer * p * (1 - p))
    assert logits.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sharpness", [1.0, 7.0])
def test_a_mask_lives_with_the_probability_of_its_logit(sharpness):
    torch.manual_seed(0)
    for probability in (0.1, 0.5, 0.8):
        logits = torch.full((40_000,), math.log(probability / (1 - probability)))
        alive = (binary_concrete(logits, logistic_noise(logits), sharpness) > 0.5).float().mean().item()
        assert alive == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 40_000))


def test_probabilities_of_zero_and_one_are_certain_and_can_come_back():
    torch.manual_seed(0)
    s = torch.tensor([0.0, 1.0, 0.25]).repeat(100_000, 1).requires_grad_()
    odds = log_odds(s)
    assert odds[0, 2].item() == pytest.approx(math.log(1 / 3), abs=1e-4)
    alive = odds + logistic_noise(s) > 0
    assert not alive[:, 0].any() and alive[:, 1].all()
    binary_concrete(odds[:1], torch.zeros(1, 3)).sum().backward()
    # Without noise and at T = 1, m is s itself (up to rounding: 1 - s is a millionth at s = 1).
    assert s.grad[0].tolist() == pytest.approx([1.0, 1.0, 1.0], rel=0.1)


def test_gated_weights_by_hand():
    parameters = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.arange(8.0).view(2, 4)}
    single = gated_weights({"a": torch.tensor([[1.0, 0.0], [0.5, 1.0]])}, [], parameters)
    assert single["a"].tolist() == [[1.0, 0.0], [1.5, 4.0]] and list(single) == ["a"]
    # Two channels, of which the linear layer b reads two numbers each.
    group = ChannelGroup("c", 2, ("f",), (), ("b",))
    channel = gated_weights({"c": torch.tensor([1.0, 0.5])}, [group], parameters)
    assert channel["b"].tolist() == [[0.0, 1.0, 1.0, 1.5], [4.0, 5.0, 3.0, 3.5]] and list(channel) == ["b"]


def test_a_channels_gate_scales_what_later_layers_see():
    algorithm = make("MRM", granularity="channel")
    gates = {group.name: torch.rand(group.channels) for group in algorithm.groups}
    x = torch.randn(3, 2, 8, 8)
    with algorithm.drawn(gates, algorithm.deployed_parameters()):
        logits = algorithm.predict(x)
    net = algorithm.featurizer
    for index in range(1, 5):
        z = getattr(net, f"bn{index - 1}")(F.relu(getattr(net, f"conv{index}")(x)))
        x = z * gates[f"featurizer.conv{index}"].view(1, -1, 1, 1)
    assert torch.allclose(algorithm.classifier(x.mean((2, 3))), logits, atol=1e-5)
    assert algorithm.drawn_network is None


def test_gates_are_parameters_by_unit_name():
    gates = Gates({"a.weight": torch.Size([2]), "b": torch.Size([1, 3])}, 1.5)
    assert {name: value.flatten().tolist() for name, value in gates.as_dict().items()} == {
        "a.weight": [1.5] * 2, "b": [1.5] * 3}  # fmt: skip
    assert gates["b"].shape == (1, 3) and len(list(gates.parameters())) == 2


# the projection -------------------------------------------------------------------------------------------------------


def project(scores: torch.Tensor, total: float) -> torch.Tensor:
    return (scores - projection_shift(scores, total)).clamp(0, 1)


def test_projection_by_hand():
    assert project(torch.tensor([0.2, 0.3]), 1.0).tolist() == pytest.approx([0.2, 0.3])  # feasible: stays
    assert project(torch.tensor([1.4, -0.3]), 1.5).tolist() == pytest.approx([1.0, 0.0])  # only the box binds
    assert project(torch.tensor([0.9, 0.5]), 1.0).tolist() == pytest.approx([0.7, 0.3], abs=1e-5)
    assert project(torch.tensor([1.6, 0.9, 0.1]), 1.5).tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-5)
    assert project(torch.ones(10), 4.0).tolist() == pytest.approx([0.4] * 10, abs=1e-5)


def test_projection_against_a_grid():
    """Of all points of a fine grid on the feasible set, none is nearer than the projection."""
    axis = np.linspace(0, 1, 51)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    for scores, total in (([0.8, 0.6, 0.9], 1.2), ([1.3, -0.2, 0.7], 0.9), ([0.5, 0.5, 1.5], 1.0)):
        feasible = grid[grid.sum(1) <= total + 1e-9]
        distances = np.linalg.norm(feasible - scores, axis=1)
        found = project(torch.tensor(scores), total).numpy()
        assert np.linalg.norm(found - scores) <= distances.min() + 1e-5
        assert np.abs(found - feasible[distances.argmin()]).max() <= 0.03


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=4), st.floats(0.05, 0.95))
def test_projection_against_a_quadratic_programme(values, keep):
    scores, total = torch.tensor(values), keep * len(values)
    found = project(scores, total).double().numpy()
    assert found.min() >= 0 and found.max() <= 1 and found.sum() <= total + 1e-5
    assert project(torch.tensor(found), total).numpy() == pytest.approx(found, abs=1e-4)
    target = scores.double().numpy()
    solved = minimize(
        lambda s: ((s - target) ** 2).sum(), np.full(len(values), keep / 2), jac=lambda s: 2 * (s - target),
        bounds=[(0, 1)] * len(values), method="SLSQP",
        constraints={"type": "ineq", "fun": lambda s: total - s.sum(), "jac": lambda s: -np.ones(len(values))},
    )  # fmt: skip
    assert ((found - target) ** 2).sum() <= solved.fun + 1e-5
    assert found == pytest.approx(solved.x, abs=5e-3)


@given(st.integers(1, 2000), st.floats(0.01, 1), st.integers(0, 9))
def test_projection_meets_its_budget(n, keep, seed):
    scores = 1.5 * torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 0.2
    total = keep * n
    projected = project(scores, total)
    assert projected.sum() <= total + 1e-4 * n
    if scores.clamp(0, 1).sum() > total:
        assert projected.sum() == pytest.approx(total, abs=1e-4 * n)
    order = scores.argsort()
    assert (projected[order].diff() >= 0).all()
