"""MRM, ModIRM, ModREx, ModGroupDRO, SparseIRM, DCWP and EVIL: every gate, projection and update against a case done by
hand or by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning.dcwp import debiased_contrastive, generalized_cross_entropy
from domainbed_sfp.algorithms.pruning.evil import ExchangeSchedule, exchange
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.gates import (
    binary_concrete,
    gated_weights,
    log_odds,
    logistic_noise,
    projection_shift,
    straight_through,
)
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.schedules import exchange_period
from domainbed_sfp.pruning.state import Gates
from domainbed_sfp.training import hparams

STEPS = 20
MODULAR = ["MRM", "ModIRM", "ModREx", "ModGroupDRO"]


def make(name: str, steps: int = STEPS, **overrides):
    values = hparams.resolve_hparams(name, "ColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).make((2, 8, 8), 2, 2, values)
    algorithm.total_steps = steps
    return algorithm


def batch(step: int, size: int = 8, shape=(2, 8, 8), classes: int = 2):
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(2)
    ]


def train(algorithm, until: int):
    while algorithm.step < until:
        torch.manual_seed(algorithm.step)
        algorithm.update(batch(algorithm.step))
    return algorithm


def weights_of(algorithm) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in algorithm.deployed_parameters().items()}


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


# MRM ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULAR)
def test_stages_of_modular_risk_minimization(name):
    """Weights move in stages 1 and 3 and gates in stage 2, whose last step prunes and rewinds."""
    algorithm = make(name, granularity="channel")
    start = weights_of(algorithm)
    for step in range(STEPS):
        before, gates = weights_of(algorithm), {k: v.detach().clone() for k, v in algorithm.gates.as_dict().items()}
        open_gates = algorithm.gates_are_open()
        assert open_gates == (8 <= step <= 12)
        train(algorithm, step + 1)
        moved = any(not torch.equal(value, before[key]) for key, value in weights_of(algorithm).items())
        learned = any(not torch.equal(value, gates[key]) for key, value in algorithm.gates.as_dict().items())
        assert learned == open_gates and moved == (not open_gates or step == 12)
        assert algorithm.at_final_compression() == (step >= 12)
        assert algorithm.sparsity() == pytest.approx(0.5 if step >= 12 else 0.0, abs=0.01)
        if step == 12:
            masks = algorithm.masks()
            for key, value in weights_of(algorithm).items():
                assert torch.equal(value, start[key] * masks.get(key, 1)), key
            assert not algorithm.optimizer.state


def test_rewinding_restores_what_belongs_to_the_beginning():
    """BatchNorm's statistics, the objective's annealing and its group weights begin anew."""
    irm, dro = make("ModIRM"), make("ModGroupDRO")
    train(irm, 12), train(dro, 12)
    assert int(irm.objective.update_count) == 12 and not torch.equal(dro.objective.q, torch.ones(2))
    train(irm, 13), train(dro, 13)
    assert int(irm.objective.update_count) == 0 and torch.equal(dro.objective.q, torch.ones(2))
    values = hparams.resolve_hparams(
        "MRM", "PACS", overrides={"backbone": "resnet18", "weights": "none", "granularity": "channel"}
    )
    algorithm = registry.get("MRM").cls((3, 32, 32), 2, 2, values)
    algorithm.total_steps = 4
    start = {name: value.clone() for name, value in algorithm.featurizer.named_buffers()}
    for step in range(3):
        algorithm.update(batch(step, 4, (3, 32, 32)))
        assert algorithm.at_final_compression() == (step == 2)
        same = [torch.equal(value, start[name]) for name, value in algorithm.featurizer.named_buffers()]
        assert all(same) == (step == 2)


def test_the_pull_of_alpha_on_the_logits():
    weight = make("MRM", mask_alpha=1e-3)
    total = sum(logits.numel() for logits in weight.gates.parameters())
    assert weight.logit_penalty().item() == pytest.approx(1e-3 * 1.5 * total, rel=1e-4)
    weight.logit_penalty().backward()
    assert all(torch.allclose(logits.grad, torch.tensor(1e-3)) for logits in weight.gates.parameters())
    channel = make("MRM", mask_alpha=1e-3, granularity="channel")
    channel.logit_penalty().backward()
    # conv1: 2 x 3 x 3 weights make a channel, 128 x 3 x 3 read it. conv4: 128 x 3 x 3 make one, the classifier's 2 read it.
    gates = channel.gates
    assert gates["featurizer.conv1"].grad[0].item() == pytest.approx(1e-3 * (18 + 1152))
    assert gates["featurizer.conv4"].grad[0].item() == pytest.approx(1e-3 * (1152 + 2))


def test_logits_get_the_gradient_of_the_masked_loss():
    """The mask stage's step is Adam's on d loss / d m * sigmoid'(logit + noise) + alpha."""
    algorithm = train(make("MRM", mask_alpha=1e-4), 8)
    data = batch(99)
    name = "featurizer.conv1.weight"
    torch.manual_seed(7)
    noises = {key: logistic_noise(logits) for key, logits in algorithm.gates.as_dict().items()}
    logits = {key: value.detach() for key, value in algorithm.gates.as_dict().items()}
    masks = {key: ((logits[key] + noise) > 0).float().requires_grad_() for key, noise in noises.items()}
    parameters = {key: value.detach() for key, value in algorithm.deployed_parameters().items()}
    with algorithm.drawn(masks, parameters):
        loss, _ = algorithm.objective.loss(algorithm, data)
    p = torch.sigmoid(logits[name] + noises[name])
    expected = torch.autograd.grad(loss, masks[name])[0] * p * (1 - p) + 1e-4
    torch.manual_seed(7)
    algorithm.update(data)
    assert torch.allclose(algorithm.gates[name].grad, expected, atol=1e-7, rtol=1e-3)
    # Adam's first step goes its learning rate's length against the sign.
    lr = algorithm.gate_learning_rate()
    moved = algorithm.gates[name].detach() - 1.5
    clear = expected.abs() > 1e-5
    assert torch.allclose(moved[clear], -lr * expected[clear].sign(), rtol=1e-2)


def test_short_mask_stages_take_longer_steps():
    assert make("MRM", 5001).gate_learning_rate() == pytest.approx(0.01, rel=1e-2)
    assert make("MRM", 50_001).gate_learning_rate() == 0.01
    assert make("MRM", 300).gate_learning_rate() == pytest.approx(0.01 * 1000 / 61)


def test_mask_rules_by_hand():
    for rule, expected in (("threshold", [True, False, True, True]), ("top_k", [True, False, False, True])):
        algorithm = make("MRM", mask_rule=rule, granularity="channel")
        with torch.no_grad():
            for logits in algorithm.gates.parameters():
                logits.fill_(-1.0)
                logits[0::4], logits[2::4], logits[3::4] = 0.9, 0.1, 0.8
        for keep in algorithm.choose_alive([], 0.5).values():
            assert keep.tolist() == expected * (len(keep) // 4)
        assert algorithm.deterministic_gates()["featurizer.conv1"][:4].tolist() == [True, False, True, True]


def test_the_papers_rule_finds_its_own_sparsity():
    algorithm = train(make("MRM", mask_rule="threshold", mask_alpha=5e-6), STEPS)
    alive = sum(int((logits > 0).sum()) for logits in algorithm.gates.parameters())
    total = sum(logits.numel() for logits in algorithm.gates.parameters())
    assert 0 < alive < total and algorithm.sparsity() == pytest.approx(1 - alive / total)
    algorithm = train(make("MRM", mask_rule="threshold"), 12)  # the mask is made behind this step
    with torch.no_grad():
        for logits in algorithm.gates.parameters():
            logits.fill_(30.0)
    with pytest.raises(UserError, match="threshold' removes nothing"):
        train(algorithm, STEPS)


@pytest.mark.parametrize("name", ["MRM", "SparseIRM", "DCWP"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_prediction_under_open_gates_is_fixed_and_exported(name, granularity):
    algorithm = make(name, granularity=granularity)
    train(algorithm, algorithm.schedule.last_step(STEPS))
    assert algorithm.gates_are_open()
    algorithm.eval()
    x = torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        logits = algorithm.predict(x)
        assert torch.equal(logits, algorithm.predict(x))
        assert torch.allclose(algorithm.export()(x), logits, atol=1e-6)
        assert not torch.allclose(algorithm.network(x), logits, atol=1e-3)
    assert algorithm.sparsity() == 0 and not algorithm.at_final_compression()


# SparseIRM ------------------------------------------------------------------------------------------------------------


def test_one_budget_for_all_layers_spares_the_best_of_each():
    algorithm = make("SparseIRM", granularity="channel", sparsity=0.9)
    with torch.no_grad():
        algorithm.gates["featurizer.conv1"].fill_(0.0)
    alive = algorithm.choose_alive([], 0.9)
    assert int(alive["featurizer.conv1"].sum()) == 1
    units = sum(keep.numel() for keep in alive.values())
    assert sum(int(keep.sum()) for keep in alive.values()) == units - round(0.9 * units)


def test_both_optimizers_begin_anew_where_the_penalty_jumps():
    algorithm = make("SparseIRM", irm_penalty_anneal_iters=9)
    fresh = []
    while algorithm.step < 14:
        before = algorithm.optimizer, algorithm.gate_optimizer
        train(algorithm, algorithm.step + 1)
        fresh.append((algorithm.optimizer is not before[0], algorithm.gate_optimizer is not before[1]))
    assert algorithm.first_gate_step() < 9
    assert [step for step, renewed in enumerate(fresh) if any(renewed)] == [9] and fresh[9] == (True, True)
    state = algorithm.gate_optimizer.state[next(iter(algorithm.gates.parameters()))]
    assert state["step"] == 14 - 9


@pytest.mark.parametrize("name", ["SparseIRM", "NetworkSlimming", "SNIP", "GraSP", "Magnitude"])
def test_a_mistyped_scope_is_told_at_once(name):
    with pytest.raises(UserError, match="did you mean 'global'"):
        make(name, pruning_scope="globl")


def test_sharpness_and_budget():
    algorithm = make("SparseIRM", 100)  # the mask is drawn at step 90
    for step, expected in ((0, 1.0), (45, 1 / (0.97 * 0.5 + 0.03)), (90, 1 / 0.03), (99, 1 / 0.03)):
        algorithm.step = step
        assert algorithm.sharpness() == pytest.approx(expected)
    budget = make("SparseIRM", 100).budget
    assert [1 - budget.at(step, 100) for step in (0, 28, 60, 99)] == [1, 1, 0.5, 0.5]
    assert 1 - budget.at(44, 100) == pytest.approx(0.5 + 0.5 * 0.5**3)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_scores_stay_within_their_budget(scope):
    algorithm = make("SparseIRM", pruning_scope=scope, granularity="channel")
    assert algorithm.first_gate_step() == 6 and algorithm.schedule.last_step(STEPS) == 18
    for step in range(STEPS):
        train(algorithm, step + 1)
        scores = [score.detach() for score in algorithm.gates.parameters()]
        keep = 1 - algorithm.budget.at(step, STEPS)
        for part in [torch.cat(scores)] if scope == "global" else scores:
            assert part.min() >= 0 and part.max() <= 1 and part.sum() <= keep * len(part) + 1e-3
        if step < 6:
            assert all(torch.equal(score, torch.ones_like(score)) for score in scores)
        assert algorithm.at_final_compression() == (step >= 18)
    assert len({round(score.item(), 4) for score in torch.cat(scores)}) > 10


@pytest.mark.parametrize("rule", ["top_k", "threshold"])
def test_the_mask_is_one_draw_from_the_scores(rule):
    algorithm = make("SparseIRM", mask_rule=rule, granularity="channel", sparsity=0.3)
    names = algorithm.gates.names
    with torch.no_grad():
        for score in algorithm.gates.parameters():
            score[: len(score) // 2], score[len(score) // 2 :] = 0.9, 0.5
    alive = torch.cat(list(algorithm.choose_alive([], 0.3).values()))
    noisy = torch.cat([log_odds(algorithm.gates[name]).detach() + algorithm.noise[name] for name in names])
    if rule == "threshold":
        assert torch.equal(alive, noisy > 0)
        assert alive.float().mean().item() == pytest.approx(0.7, abs=0.07)
    else:
        assert alive.sum() == len(alive) - round(0.3 * len(alive)) and noisy[alive].min() > noisy[~alive].max()
    certain = torch.cat([score.detach() for score in algorithm.gates.parameters()]) == 0.9
    assert alive[certain].float().mean() > alive[~certain].float().mean() + 0.2


def test_weights_and_scores_are_trained_together():
    algorithm = train(make("SparseIRM"), 10)
    before, scores = weights_of(algorithm), {k: v.detach().clone() for k, v in algorithm.gates.as_dict().items()}
    train(algorithm, 11)
    assert any(not torch.equal(value, before[key]) for key, value in weights_of(algorithm).items())
    assert any(not torch.equal(value, scores[key]) for key, value in algorithm.gates.as_dict().items())


def test_scores_get_the_gradient_of_the_relaxed_masks_loss():
    """d loss / ds = d loss / dm T m (1 - m) (1/s + 1/(1 - s)), T the sharpness of the step (its formula by hand)."""
    algorithm = train(make("SparseIRM"), 10)
    data, name = batch(99), "featurizer.conv1.weight"
    last = algorithm.schedule.last_step(STEPS)
    sharpness = 1 / (0.97 * (1 - 10 / last) + 0.03)
    scores = {key: score.detach() for key, score in algorithm.gates.as_dict().items()}
    torch.manual_seed(7)
    masks = {}
    for key, score in scores.items():
        u = torch.rand_like(score).clamp(1e-5, 1 - 1e-5)
        odds = torch.log(score + 1e-6) - torch.log(1 - score + 1e-6)
        masks[key] = torch.sigmoid(sharpness * (odds + torch.log(u) - torch.log(1 - u))).requires_grad_()
    parameters = {key: value.detach() for key, value in algorithm.deployed_parameters().items()}
    with algorithm.drawn(masks, parameters):
        loss, _ = algorithm.objective.loss(algorithm, data)
    m, s = masks[name].detach(), scores[name]
    slope = sharpness * m * (1 - m) * (1 / (s + 1e-6) + 1 / (1 - s + 1e-6))
    expected = torch.autograd.grad(loss, masks[name])[0] * slope
    torch.manual_seed(7)
    found, _ = algorithm.compute_loss(data)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(algorithm.gates[name].grad, expected, atol=1e-6, rtol=1e-3)
    assert expected.abs().max() > 1e-4


# DCWP -----------------------------------------------------------------------------------------------------------------


def test_gce_weighs_the_cross_entropys_gradient_by_p_to_the_q():
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, 4)).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    p = F.softmax(logits, 1).gather(1, y[:, None]).squeeze(1).detach()
    loss = generalized_cross_entropy(logits, y, 0.7)
    assert loss.item() == pytest.approx(((1 - p**0.7) / 0.7).mean().item(), rel=1e-5)
    found = torch.autograd.grad(loss, logits)[0]
    expected = torch.autograd.grad((p**0.7 * F.cross_entropy(logits, y, reduction="none")).mean(), logits)[0]
    assert torch.allclose(found, expected, atol=1e-7)
    extreme = torch.tensor([[0.0, 500.0]], requires_grad=True)  # p underflows to 0
    generalized_cross_entropy(extreme, torch.tensor([0]), 0.7).backward()
    assert torch.isfinite(extreme.grad).all()


def test_debiased_contrastive_loss_by_hand():
    """Four unit vectors in the plane; sample 1 (class 0) and sample 3 (class 1) are bias-conflicting. Anchor 0 has the
    positive 1, anchor 2 has 3; anchors 1 and 3 have none, since their only classmates are aligned."""
    angles = torch.tensor([0.0, 0.4, 1.5, 2.2])
    z = torch.stack([angles.cos(), angles.sin()], 1)
    y, conflicting = torch.tensor([0, 0, 1, 1]), torch.tensor([False, True, False, True])
    weights = torch.tensor([1.0, 80.0, 3.0, 80.0])

    def term(anchor: int, positive: int) -> float:
        similar = {other: math.cos(angles[anchor] - angles[other]) / 0.5 for other in range(4) if other != anchor}
        return -(similar[positive] - math.log(sum(map(math.exp, similar.values()))))

    expected = (1 * term(0, 1) + 3 * term(2, 3)) / 4
    assert debiased_contrastive(z, y, conflicting, weights, 0.5).item() == pytest.approx(expected, rel=1e-5)
    everyone = torch.ones(4, dtype=torch.bool)
    mean = (term(0, 1) + term(1, 0) + term(2, 3) + term(3, 2)) / 4
    assert debiased_contrastive(z, y, everyone, torch.ones(4), 0.5).item() == pytest.approx(mean, rel=1e-5)
    assert debiased_contrastive(z, y, ~everyone, weights, 0.5).item() == 0
    assert debiased_contrastive(z[:1], y[:1], everyone[:1], weights[:1], 0.5).item() == 0


def test_dcwp_weighs_what_the_biased_model_gets_wrong():
    algorithm = train(make("DCWP", contrastive_weight=0.0), 9)
    assert algorithm.gates_are_open()
    biased = {name: value.clone() for name, value in algorithm.biased.state_dict().items()}
    data = batch(50)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    algorithm.biased.eval()
    wrong = algorithm.biased(x).argmax(1) != y
    assert wrong.any() and not wrong.all()
    ones = {name: torch.ones_like(gate) for name, gate in algorithm.gates.as_dict().items()}
    with algorithm.drawn(ones, algorithm.deployed_parameters()):
        loss, metrics = algorithm.compute_loss(data)
        losses = F.cross_entropy(algorithm.network(x), y, reduction="none")
    weights = torch.where(wrong, 80.0, 1.0)
    assert loss.item() == pytest.approx(((weights * losses).sum() / weights.sum()).item(), rel=1e-4)
    assert metrics["conflicting"] == pytest.approx(wrong.float().mean().item())
    train(algorithm, STEPS)
    for name, value in algorithm.biased.state_dict().items():
        assert torch.equal(value, biased[name])


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_dcwps_contrastive_loss_sees_every_mask(granularity):
    """Also that of the channels which the classifier reads: what a closed gate leaves of a feature is 0."""
    algorithm = train(make("DCWP", granularity=granularity, backbone="mnist_cnn_bn"), 10)
    assert algorithm.gates_are_open()
    gates = {name: torch.ones_like(gate).requires_grad_() for name, gate in algorithm.gates.as_dict().items()}
    x = torch.cat([x for x, _ in batch(3)])
    with algorithm.drawn(gates, {}):
        features = algorithm.features(x)
        y, conflicting = torch.arange(len(x)) % 2, torch.arange(len(x)) % 3 == 0
        loss = debiased_contrastive(F.normalize(features, dim=1), y, conflicting, torch.ones(len(x)), 0.1)
    for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values()), allow_unused=True)):
        assert gradient is not None and gradient.abs().max() > 0, name
    if granularity == "channel":
        last = algorithm.groups[-1]
        closed = {name: torch.ones_like(gate) for name, gate in gates.items()}
        closed[last.name][::2] = 0
        with torch.no_grad(), algorithm.drawn(closed, {}):
            half = algorithm.features(x)
            # The classifier's columns are not gated once more.
            assert torch.equal(algorithm.classify(half), algorithm.classifier(half))
        dead = (1 - closed[last.name]).repeat_interleave(half.shape[1] // last.channels).bool()
        assert half[:, dead].abs().max() == 0 and torch.equal(half[:, ~dead], features.detach()[:, ~dead])


@pytest.mark.parametrize("objective", ["IRM", "VREx", "GroupDRO", "CORAL", "Mixup"])
def test_any_objective_trains_mrms_masks(objective):
    """The gates' gradient is that of the objective, not of alpha alone; IRM's is ModIRM's."""
    algorithm = train(make("MRM", objective=objective, granularity="channel", mask_alpha=0.0), 9)
    assert algorithm.gates_are_open()
    torch.manual_seed(5)
    algorithm.update(batch(9))
    for name, gate in algorithm.gates.as_dict().items():
        assert gate.grad.abs().max() > 0, name
    if objective == "IRM":
        named = train(make("ModIRM", granularity="channel", mask_alpha=0.0), 9)
        torch.manual_seed(5)
        named.update(batch(9))
        assert all(torch.equal(named.gates[name].grad, gate.grad) for name, gate in algorithm.gates.as_dict().items())


def test_dcwp_retrains_from_where_it_was():
    algorithm = make("DCWP")
    boundary = algorithm.schedule.last_step(STEPS)
    assert algorithm.first_gate_step() == 9 and boundary == 18
    train(algorithm, 9)
    trained = weights_of(algorithm)
    train(algorithm, boundary + 1)
    masks = algorithm.masks()
    for name, value in weights_of(algorithm).items():
        assert torch.equal(value, trained[name] * masks.get(name, 1)), name
    assert algorithm.at_final_compression() and not algorithm.optimizer.state


# EVIL -----------------------------------------------------------------------------------------------------------------


def test_exchange_by_hand():
    weight = torch.tensor([[0.9, -0.1, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0]])
    alive = torch.tensor([[True] * 4, [False] * 4])
    gradient = torch.tensor([[9.0, 0.5, 9.0, 9.0], [0.4, -0.1, 0.3, -0.6]])
    # Half of the four living ones go: |-0.1| and |0.2|. Of the six not kept, .1 and .3 are the smallest gradients.
    after = exchange(weight, gradient, alive, 0.5)
    assert after.tolist() == [[True, False, True, False], [False, True, True, False]]
    # A dropped weight whose domain gradient is the smallest wins its place back.
    gradient[0, 1] = 0.05
    assert exchange(weight, gradient, alive, 0.5).tolist() == [[True, True, True, False], [False, True, False, False]]
    # What has no gradient at all reaches no output: it grows only where nothing else is left.
    gradient[0, 1] = gradient[1, 1] = 0.0
    assert exchange(weight, gradient, alive, 0.5).tolist() == [[True, False, True, False], [True, False, True, False]]
    nothing = torch.zeros(2, 4)
    assert exchange(weight, nothing, alive, 0.5).tolist() == [[True, True, True, True], [False] * 4]
    assert torch.equal(exchange(weight, gradient, alive, 0.2), alive)


def test_short_runs_exchange_at_longer_intervals():
    assert exchange_period(0, 5001) == 100 and exchange_period(0, 300) == 25 and exchange_period(0.02, 300) == 6


def test_exchange_schedule():
    schedule = ExchangeSchedule(0.5, 0.2, 0.7, 0.1, 0.4)
    assert [step for step in range(100) if schedule.exchanges_at(step, 100)] == [30, 40, 50, 60]
    assert (schedule.first_step(100), schedule.last_step(100)) == (20, 60)
    assert [schedule.at(step, 100) for step in (19, 20, 99)] == [0, 0.5, 0.5]
    assert schedule.fraction_at(20, 100) == pytest.approx(0.4)
    assert schedule.fraction_at(45, 100) == pytest.approx(0.2)
    assert schedule.fraction_at(70, 100) == pytest.approx(0.0)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 300))
def test_exchanges_end_within_the_run(a, b, interval, total):
    schedule = ExchangeSchedule(0.5, min(a, b), max(a, b), interval, 0.3)
    steps = [step for step in range(total) if schedule.exchanges_at(step, total)]
    assert 0 <= schedule.first_step(total) <= schedule.last_step(total) < total
    assert schedule.last_step(total) == max(steps, default=schedule.first_step(total))
    assert all(0 <= schedule.fraction_at(step, total) <= 0.3 for step in steps)


def test_evil_begins_by_magnitude_and_exchanges_at_equal_sparsity():
    algorithm = make("EVIL", prune_start=0.2, update_interval=0.1, update_end=0.75, update_fraction=0.5)
    first, moved_at = algorithm.schedule.first_step(STEPS), []
    for step in range(STEPS):
        earlier = algorithm.masks()
        train(algorithm, step + 1)
        now, weights = algorithm.masks(), weights_of(algorithm)
        assert algorithm.sparsity() == pytest.approx(0.5 if step >= first else 0.0, abs=0.01)
        assert algorithm.at_final_compression() == (step >= algorithm.schedule.last_step(STEPS))
        if step == first:
            for mask in now.values():
                assert mask.sum() == mask.numel() - round(0.5 * mask.numel())
        for name, mask in now.items():
            assert not weights[name][~mask].any()
            grown = mask & ~earlier[name]
            assert not weights[name][grown].any()
            if grown.any():
                moved_at.append(step)
                parameter = dict(algorithm.named_parameters())[name]
                assert not algorithm.optimizer.state[parameter]["exp_avg"][grown].any()
    assert sorted(set(moved_at)) == [6, 8, 10, 12, 14]


def test_the_domain_gradient_against_finite_differences():
    algorithm = train(make("EVIL"), 8).double()
    data = [(x.double(), y) for x, y in batch(3)]
    x, domains = torch.cat([x for x, _ in data]), torch.tensor([0] * 8 + [1] * 8)

    def loss() -> torch.Tensor:
        return F.cross_entropy(algorithm.domain_classifier(algorithm.featurizer(x)), domains)

    gradients = algorithm._domain_gradients(algorithm.featurizer(x), domains)
    name = "featurizer.conv2.weight"
    weight, dead = dict(algorithm.named_parameters())[name], ~algorithm.masks()[name]
    index = tuple(dead.nonzero()[0].tolist())  # a dead weight: its gradient decides whether it grows
    with torch.no_grad():
        values = []
        for shift in (1e-5, -2e-5):
            weight[index] += shift
            values.append(loss().item())
    assert gradients[name][index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_the_domain_classifier_learns_and_leaves_the_features_alone():
    algorithm, plain = make("EVIL"), make("ERM")
    plain.load_state_dict(algorithm.state_dict(), strict=False)
    losses = []
    for step in range(4):  # dense until step 4
        data = [(x + 3 * domain, y) for domain, (x, y) in enumerate(batch(step))]
        losses.append(algorithm.update(data)["domain_loss"])
        plain.update(data)
    assert losses[-1] < losses[0]
    for one, other in zip(algorithm.network.parameters(), plain.network.parameters()):
        assert torch.equal(one, other)


# all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, overrides",
    [("MRM", {"granularity": "channel"}), ("SparseIRM", {"granularity": "channel"}),
     ("DCWP", {"granularity": "channel"}), ("EVIL", {"update_interval": 0.2})],
)  # fmt: skip
def test_a_network_with_batchnorm_and_depthwise_convolutions(name, overrides):
    overrides = {"backbone": "efficientnet_lite0", "weights": "none", **overrides}
    torch.manual_seed(0)
    algorithm = registry.get(name).make((3, 32, 32), 2, 2, hparams.resolve_hparams(name, "PACS", overrides=overrides))
    algorithm.total_steps = 6
    x = torch.randn(4, 3, 32, 32)
    for step in range(6):
        algorithm.update(batch(step, 4, (3, 32, 32)))
        algorithm.prepare_evaluation([torch.cat([x for x, _ in batch(90, 8, (3, 32, 32))])])
        algorithm.eval()
        with torch.no_grad():
            logits = algorithm.predict(x)
            assert torch.isfinite(logits).all() and torch.allclose(algorithm.export()(x), logits, atol=1e-4)
        algorithm.train()
    assert algorithm.at_final_compression() and algorithm.sparsity() == pytest.approx(0.5, abs=0.01)
    parameters = dict(algorithm.named_parameters())
    assert all(not parameters[key][~mask].any() for key, mask in algorithm.masks().items())


@pytest.mark.parametrize(
    "name, overrides, part",
    [
        ("MRM", {"mask_end": 0.7}, "'mask_end' of MRM is 0.7: it is built in as 0.6 now"),
        ("MRM", {"mask_alpha": -5.0}, "mask_alpha"),
        ("MRM", {"mask_rule": "topk"}, "did you mean 'top_k'"),
        ("MRM", {"mask_rule": "threshold", "sparsity": 0.0}, "finds its own sparsity"),
        ("MRM", {"sparsity": 1.0}, "sparsity"),
        ("SparseIRM", {"objective": "ERM"}, "known: IRM, VREx"),
        ("SparseIRM", {"objective": 3}, "expected the name of an objective, got 3"),
        ("DCWP", {"retrain_upweight": 0.0}, "retrain_upweight"),
        ("EVIL", {"granularity": "channel"}, "'weight'"),
        ("EVIL", {"objective": "Mixup"}, "Mixup"),
        ("EVIL", {"update_end": 0.1}, "ends before it begins"),
        ("EVIL", {"update_fraction": 1.5}, "update_fraction"),
        ("EVIL", {"growth_gradient": "accumulated"}, "built in as 'domain' now"),
    ],
)
def test_bad_input_is_refused_in_one_line(name, overrides, part):
    with pytest.raises(UserError, match=part) as error:
        make(name, **overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*MODULAR, "SparseIRM", "DCWP", "EVIL"])
def test_random_hparams_train(name):
    for seed in range(1, 4):
        values = {**hparams.resolve_hparams(name, "ColoredDigits", seed), "sparsity": 0.5, "batch_size": 8}
        torch.manual_seed(seed)
        algorithm = registry.get(name).make((2, 8, 8), 2, 2, values)
        algorithm.total_steps = 4
        train(algorithm, 4)
        assert all(torch.isfinite(value).all() for value in weights_of(algorithm).values())


def test_evil_needs_domains():
    values = hparams.resolve_hparams("EVIL", "ColoredDigits")
    with pytest.raises(UserError, match="at least 2, got 1"):
        registry.get("EVIL").cls((2, 8, 8), 2, 1, values)


@pytest.mark.parametrize("name", [*MODULAR, "SparseIRM", "DCWP", "EVIL"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_reach_their_final_compression(name, steps):
    overrides = {"granularity": "channel"} if name != "EVIL" else {}
    algorithm = train(make(name, steps, **overrides), steps)
    assert algorithm.at_final_compression() and algorithm.sparsity() == pytest.approx(0.5, abs=0.01)
    assert isinstance(algorithm.export(), nn.Module)
