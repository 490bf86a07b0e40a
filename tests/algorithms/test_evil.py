"""EVIL: exchanges by hand, the domain gradient by finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modular_runs import STEPS, batch, make, train, weights_of

from domainbed_sfp.algorithms.pruning.evil import ExchangeSchedule, exchange
from domainbed_sfp.pruning.schedules import exchange_period

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
