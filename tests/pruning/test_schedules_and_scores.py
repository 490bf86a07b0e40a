"""Schedules, scores and masks on cases small enough to do by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import _train

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.masks import keep_highest
from domainbed_sfp.pruning.schedules import CubicSchedule
from domainbed_sfp.pruning.scores import by_group, channel_magnitude, random_like, weight_magnitude
from domainbed_sfp.pruning.state import Masks


def test_cubic_schedule_by_hand():
    schedule = CubicSchedule(0.8, 0.1, 0.5)
    assert [schedule.at(step, 100) for step in (0, 10, 50, 99)] == [0.0, 0.0, 0.8, 0.8]
    assert schedule.at(30, 100) == pytest.approx(0.8 * (1 - 0.5**3))
    assert schedule.at(20, 100) == pytest.approx(0.8 * (1 - 0.75**3))


@given(st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1), st.integers(1, 400))
def test_cubic_schedule_rises_and_arrives_within_the_run(sparsity, a, b, total):
    schedule = CubicSchedule(sparsity, min(a, b), max(a, b))
    values = [schedule.at(step, total) for step in range(total)]
    assert values == sorted(values) and values[-1] == sparsity and all(0 <= v <= sparsity for v in values)


@pytest.mark.parametrize(
    "overrides, part",
    [
        ({"sparsity": 1.0}, "'sparsity'.*1.0"),
        ({"sparsity": -0.1}, "'sparsity'.*-0.1"),
        ({"prune_start": 0.6, "prune_end": 0.5}, "ends before"),
        ({"prune_end": 1.5}, "'prune_end'.*1.5"),
    ],
)
def test_impossible_schedules_are_refused(overrides, part):
    with pytest.raises(UserError, match=part):
        _train("Magnitude", 1, **overrides)


def test_keep_highest_by_hand():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0, 4.0]), "b": torch.tensor([[0.1, 0.3], [0.2, 0.4]])}
    layer = keep_highest(scores, 0.5, "layer")
    assert layer["a"].tolist() == [True, False, False, True]
    assert layer["b"].tolist() == [[False, True], [False, True]]
    scores["b"] += 0.9
    everything = keep_highest(scores, 0.5, "global")
    assert everything["a"].tolist() == [True, False, True, True]  # 1.0, 1.1 x, 1.2, 1.3 x are the lowest
    assert everything["b"].tolist() == [[False, False], [False, True]]


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_keep_highest_removes_the_lowest_fraction(n, sparsity):
    scores = {"a": torch.rand(n, generator=torch.Generator().manual_seed(n))}
    keep = keep_highest(scores, sparsity)["a"]
    removed = n - int(keep.sum())
    assert removed == min(round(sparsity * n), n - 1)
    if removed:
        assert scores["a"][~keep].max() < scores["a"][keep].min()


def test_global_pruning_that_wipes_out_a_layer_names_it():
    with pytest.raises(UserError, match="'small'"):
        keep_highest({"small": torch.zeros(3), "large": torch.ones(9)}, 0.5, "global")


def test_masks_check_themselves():
    masks = Masks({"conv.weight": torch.Size([2, 2])})
    masks.set("conv.weight", torch.tensor([[True, False], [True, True]]))
    weight = torch.full((2, 2), 3.0)
    masks.zero_dead({"conv.weight": weight})
    assert weight.tolist() == [[3, 0], [3, 3]]
    with pytest.raises(UserError, match=r"another network.*\(3,\).*\(2, 2\)"):
        masks.set("conv.weight", torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="no such parameter"):
        masks.set("other", torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(UserError, match=r"wipe out 'conv\.weight'"):
        masks.set("conv.weight", torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="bool"):
        masks.set("conv.weight", torch.ones(2, 2))
    assert masks.as_dict()["conv.weight"].tolist() == [[True, False], [True, True]]


def test_scores_by_hand():
    weight = torch.tensor([[[[3.0]], [[-4.0]]], [[[0.0]], [[1.0]]]])
    group = ChannelGroup("c", 2, ("c.weight", "dw.weight"), (), ())
    norms = by_group(
        channel_magnitude, [group], {"c.weight": weight, "dw.weight": torch.tensor([[[[0.0]]], [[[2.0]]]])}
    )
    assert norms["c"].tolist() == pytest.approx([5.0, 5**0.5])
    assert weight_magnitude(weight).flatten().tolist() == [3, 4, 0, 1]
    torch.manual_seed(0)
    first = random_like({"a": torch.Size([5])}, torch.device("cpu"))["a"]
    assert first.min() >= 0 and first.max() <= 1 and len(set(first.tolist())) == 5
