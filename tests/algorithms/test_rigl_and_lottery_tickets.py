"""RigL and LotteryTicket: schedules by hand, growth, rewinding, and what all baselines refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from baseline_runs import STEPS, _batch, _make, _update

from domainbed_sfp.algorithms.pruning.rigl import RigLSchedule, drop_and_grow, layer_densities
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.schedules import OneShotSchedule, RoundSchedule

# RigL ---------------------------------------------------------------------------------------------------------------


def test_drop_and_grow_by_hand():
    weight = torch.tensor([[0.1, -0.9, 0.0], [0.3, 0.0, -0.2]])
    alive = torch.tensor([[True, True, False], [True, False, True]])
    gradient = torch.tensor([[0.0, 9.0, -3.0], [8.0, 1.0, 2.0]])
    # Half of four: .1 and -.2 are dropped; of the gradients 0, -3, 1 and 2 that are not kept, -3 and 2 are largest, so
    # that -.2 returns at once.
    assert drop_and_grow(weight, gradient, alive, 0.5).tolist() == [[False, True, True], [True, False, True]]
    assert drop_and_grow(weight, gradient, alive, 0.49).tolist() == [[False, True, True], [True, False, True]]
    assert torch.equal(drop_and_grow(weight, gradient, alive, 0.2), alive)  # less than one weight
    dense = torch.ones(2, 3, dtype=torch.bool)
    assert drop_and_grow(weight, gradient, dense, 0.5).all()


def test_rigl_schedule_by_hand():
    schedule = RigLSchedule(0.8, 100 / 5001, 0.75, 0.3)
    assert schedule.period(5001) == 100 and schedule.period(300) == 6 and schedule.period(24) == 2
    default = RigLSchedule(0.8, 0.0, 0.75, 0.3)
    assert default.period(5001) == 100 and default.period(300) == 25
    assert [step for step in range(300) if default.moves_at(step, 300)] == list(range(25, 225, 25))
    moves = [step for step in range(5001) if schedule.moves_at(step, 5001)]
    assert moves == list(range(100, 3701, 100))
    assert schedule.last_step(5001) == moves[-1] and schedule.first_step(5001) == 0
    assert len([step for step in range(300) if schedule.moves_at(step, 300)]) == 37  # as many stages
    assert schedule.fraction_at(0, 1000) == pytest.approx(0.3)
    assert schedule.fraction_at(250, 1000) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert schedule.fraction_at(375, 1000) == pytest.approx(0.15)
    assert schedule.fraction_at(750, 1000) == pytest.approx(0.0)
    assert schedule.last_step(2) == 0 and not any(schedule.moves_at(step, 2) for step in range(2))


def test_layer_densities_by_hand():
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([10, 10])}
    # erk: (2 + 3) / 6 and (10 + 10) / 100; at 25% of 106 weights, 26.5 = scale * (5 + 20).
    erk = layer_densities(shapes, 0.25, "erk")
    assert erk == pytest.approx({"a": 1.06 * 5 / 6, "b": 1.06 * 0.2})
    # At 50%, a would need 2.12 * 5 / 6 > 1: it is dense, and b takes 53 - 6 of its 100.
    assert layer_densities(shapes, 0.5, "erk") == pytest.approx({"a": 1.0, "b": 0.47})
    assert layer_densities(shapes, 0.5, "uniform") == pytest.approx({"a": 1.0, "b": 0.47})
    assert layer_densities(shapes, 1.0, "erk") == {"a": 1.0, "b": 1.0}
    with pytest.raises(UserError, match="first layer"):
        layer_densities(shapes, 0.05, "uniform")


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_rigl_keeps_its_sparsity_and_grows_at_zero(distribution):
    algorithm = _make("RigL", sparsity=0.8, sparsity_distribution=distribution, update_interval=0.2)
    parameters = dict(algorithm.named_parameters())
    counts = []
    before = None
    for step in range(STEPS):
        weights = {name: parameters[name].detach().clone() for name in algorithm.unit_shapes}
        _update(algorithm, step)
        masks = algorithm.masks()
        counts.append([int(mask.sum()) for mask in masks.values()])
        assert algorithm.sparsity() == pytest.approx(0.8, abs=1e-4)
        assert algorithm.at_final_compression() == (step >= 12)
        for name, mask in masks.items():
            assert not parameters[name][~mask].any()
            if before is not None and step in (4, 8, 12):  # T_end is step 15
                grown = mask & ~before[name]
                assert not parameters[name][grown].any()
                assert not algorithm.optimizer.state[parameters[name]]["exp_avg"][grown].any()
                assert torch.equal(parameters[name][mask & before[name]], weights[name][mask & before[name]])
            elif before is not None:
                assert torch.equal(mask, before[name])
        if step == 4:
            fraction = 0.15 * (1 + math.cos(math.pi * 4 / 15))
            grown = {name: int((mask & ~before[name]).sum()) for name, mask in masks.items()}
            assert any(grown.values())
            assert all(grown[name] <= int(fraction * before[name].sum()) for name in grown)
        before = masks
    assert all(count == counts[0] for count in counts)


def test_rigl_moves_by_the_dense_gradient():
    """At a moving step, the mask of drop_and_grow on a gradient computed apart; nothing else trains in that step."""
    algorithm = _make("RigL", sparsity=0.8, update_interval=0.1)
    for step in range(2):
        _update(algorithm, step)
    twin = copy.deepcopy(algorithm)
    x, y = (torch.cat(part) for part in zip(*_batch(2)))
    twin.zero_grad()
    F.cross_entropy(twin.predict(x), y).backward()
    fraction = 0.15 * (1 + math.cos(math.pi * 2 / 15))
    _update(algorithm, 2)
    parameters, masks = dict(twin.named_parameters()), twin.masks()
    for name, mask in algorithm.masks().items():
        weight = parameters[name]
        expected = drop_and_grow(weight.detach(), weight.grad, masks[name], fraction)
        assert torch.equal(mask, expected)
        if not mask.all():  # erk leaves the first layer dense here
            assert weight.grad[~masks[name]].any() and not torch.equal(mask, masks[name])
    assert torch.equal(algorithm.classifier.weight, twin.classifier.weight)


def test_rigl_refuses_channels():
    with pytest.raises(UserError, match="'granularity' of RigL is 'channel': it is built in as 'weight'"):
        _make("RigL", granularity="channel")
    for name in ("drop_fraction", "update_interval", "update_end"):
        with pytest.raises(UserError, match=f"{name}.*1.5"):
            _make("RigL", **{name: 1.5})


# LotteryTicket ------------------------------------------------------------------------------------------------------


def test_round_schedule_by_hand():
    schedule = RoundSchedule(sparsity=0.875, rounds=3, end=0.6)
    assert schedule.steps(100) == [20, 40, 60]
    assert [schedule.at(step, 100) for step in (0, 19, 20, 39, 40, 60, 99)] == pytest.approx(
        [0, 0, 0.5, 0.5, 0.75, 0.875, 0.875]
    )
    assert schedule.steps(2) == [0, 1, 1] and schedule.at(1, 2) == 0.875 and schedule.at(0, 2) == pytest.approx(0.5)


def test_one_shot_schedule_by_hand():
    schedule = OneShotSchedule(0.5, 0.25)
    assert [schedule.at(step, 20) for step in (0, 4, 5, 19)] == [0, 0, 0.5, 0.5]
    assert OneShotSchedule(0.5, 1.0).first_step(20) == 19


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_lottery_tickets_rewind_to_the_early_state(granularity):
    """Weights, moments and counters are exactly those before step 3, times the mask, after each of the prunings."""
    algorithm = _make("LotteryTicket", granularity=granularity, sparsity=0.875, rewind=0.15, objective="VREx")
    pruned_at, density = (4, 8, 12), {4: 0.5, 8: 0.25, 12: 0.125}
    early: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        if step == 3:
            early = {name: value.detach().clone() for name, value in algorithm.named_parameters()}
            moments = {
                name: algorithm.optimizer.state[value]["exp_avg_sq"].clone()
                for name, value in algorithm.named_parameters()
            }
        trained = {name: value.detach().clone() for name, value in algorithm.named_parameters()}
        _update(algorithm, step)
        masks = algorithm.masks()
        if step in pruned_at:
            assert 1 - algorithm.sparsity() == pytest.approx(density[step], abs=0.01)
            for name, value in algorithm.named_parameters():
                assert torch.equal(value, early[name] * masks.get(name, torch.ones(())))
                state = algorithm.optimizer.state[value]
                assert state["step"].item() == 3 and torch.equal(state["exp_avg_sq"], moments[name])
            assert int(algorithm.objective.update_count) == 3
        else:
            assert any(not torch.equal(value, trained[name]) for name, value in algorithm.named_parameters())
        assert algorithm.at_final_compression() == (step >= 12)
    assert int(algorithm.objective.update_count) == 3 + STEPS - 13


def test_lottery_tickets_rank_the_trained_weights():
    algorithm = _make("LotteryTicket", granularity="weight", sparsity=0.5, rounds=1, prune_end=0.5, rewind=0.0)
    dense = _make("Magnitude", granularity="weight", sparsity=0.0)
    start = {name: value.detach().clone() for name, value in algorithm.named_parameters()}
    for step in range(11):
        _update(algorithm, step)
        _update(dense, step)
    trained = dict(dense.named_parameters())
    for name, mask in algorithm.masks().items():
        magnitude = trained[name].detach().abs()
        assert magnitude[~mask].max() <= magnitude[mask].min()
        assert torch.equal(dict(algorithm.named_parameters())[name], start[name] * mask)


def test_lottery_tickets_go_on_as_a_masked_network_would():
    """After the last rewinding, training is that of a network that had the mask and the early state all along."""
    algorithm = _make("LotteryTicket", granularity="weight", rounds=1, prune_end=0.5, rewind=0.0)
    start = copy.deepcopy(algorithm.network)
    for step in range(11):
        _update(algorithm, step)
    optimizer = torch.optim.Adam(start.parameters(), lr=algorithm.hparams["lr"])
    named = {f"{part}.{key}": value for part, module in zip(("featurizer", "classifier"), start)
             for key, value in module.named_parameters()}  # fmt: skip
    for step in range(11, 14):
        with torch.no_grad():
            for name, mask in algorithm.masks().items():
                named[name].mul_(mask)
        x, y = (torch.cat(part) for part in zip(*_batch(step)))
        optimizer.zero_grad()
        F.cross_entropy(start(x), y).backward()
        optimizer.step()
        _update(algorithm, step)
    for name, mask in algorithm.masks().items():
        assert torch.allclose(dict(algorithm.named_parameters())[name], named[name] * mask, atol=1e-6)


def test_lottery_tickets_refuse_to_rewind_past_the_first_pruning():
    with pytest.raises(UserError, match=r"'rewind'.*0\.2.*0\.25"):
        _make("LotteryTicket", rewind=0.25)


@pytest.mark.parametrize(
    "name, hparam, value",
    [
        ("GraSP", "grasp_temperature", 0.0),
        ("Taylor", "taylor_momentum", 1.0),
        ("NetworkSlimming", "slimming_penalty", -1.0),
        ("SNIP", "sparsity", 1.0),
        ("LotteryTicket", "rounds", 0),
    ],
)
def test_impossible_values_are_refused(name, hparam, value):
    with pytest.raises(UserError, match=f"'{hparam}'.*{value}"):
        _make(name, **{hparam: value})


def test_an_end_that_leaves_no_retraining_is_refused():
    with pytest.raises(UserError, match=r"'prune_end'.*steps to train what is kept"):
        _make("LotteryTicket", prune_end=1.0)
