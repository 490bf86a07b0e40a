"""SparseIRM: scores within their budget, masks drawn from them."""

from __future__ import annotations

import pytest
import torch
from modular_runs import STEPS, batch, make, train, weights_of

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.gates import (
    log_odds,
)

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
