"""Schedules, scores, masks, structure and accounting on cases small enough to do by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from domainbed_sfp import hparams, networks, registry
from domainbed_sfp.errors import UserError
from domainbed_sfp.pruning.accounting import count_positions, measure_cost
from domainbed_sfp.pruning.masks import Masks, keep_highest, lower_channels
from domainbed_sfp.pruning.schedules import CubicSchedule
from domainbed_sfp.pruning.scores import channel_magnitude, prunable_weights, random_like, weight_magnitude
from domainbed_sfp.pruning.structure import ChannelGroup, channel_groups


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
    "case, part",
    [
        ((1.0, 0.1, 0.5), "1.0"),
        ((-0.1, 0.1, 0.5), "-0.1"),
        ((0.5, 0.6, 0.5), "ends before"),
        ((0.5, 0.1, 1.5), "prune_end"),
    ],
)
def test_impossible_schedules_are_refused(case, part):
    with pytest.raises(UserError, match=part):
        CubicSchedule(*case)


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
    norms = channel_magnitude([group], {"c.weight": weight, "dw.weight": torch.tensor([[[[0.0]]], [[[2.0]]]])})
    assert norms["c"].tolist() == pytest.approx([5.0, 5**0.5])
    assert weight_magnitude({"c.weight": weight})["c.weight"].flatten().tolist() == [3, 4, 0, 1]
    torch.manual_seed(0)
    first = random_like({"a": torch.Size([5])}, torch.device("cpu"))["a"]
    assert first.min() >= 0 and first.max() <= 1 and len(set(first.tolist())) == 5


def _featurizer(backbone: str) -> networks.Featurizer:
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": backbone, "weights": "none"})
    torch.manual_seed(0)
    return networks.make_featurizer((3, 32, 32), values)


# Channels that structured pruning may remove, counted by hand from the architectures: the convolutions inside ResNet's
# blocks (and ResNet-50's stem, which no addition reaches); Lite0's stem, hidden channels, and the outputs that no
# addition reaches (16, 320, 1280).
BLOCK_INTERNAL = {
    "mnist_cnn": [64, 128, 128, 128],
    "resnet18": [64, 64, 128, 128, 256, 256, 512, 512],
    "resnet50": [64, *[64] * 6, *[128] * 8, *[256] * 12, *[512] * 6],
    "efficientnet_lite0": [32, 16, 96, 144, 144, 240, 240, *[480] * 3, *[672] * 3, *[1152] * 4, 320, 1280],
}


@pytest.mark.parametrize("backbone", BLOCK_INTERNAL)
def test_channel_groups(backbone):
    featurizer = _featurizer(backbone)
    groups = channel_groups(featurizer, nn.Linear(featurizer.n_outputs, 7))
    assert [group.channels for group in groups] == BLOCK_INTERNAL[backbone]
    if backbone == "efficientnet_lite0":
        hidden = groups[2]
        assert hidden.filters == (
            "featurizer.network.blocks.1.expand_conv.weight",
            "featurizer.network.blocks.1.depthwise_conv.weight",
        )
        assert hidden.readers == ("featurizer.network.blocks.1.project_conv.weight",)
        assert groups[-1].readers == ("classifier.weight",)


@pytest.mark.parametrize("backbone", BLOCK_INTERNAL)
def test_a_dead_channel_cannot_be_heard(backbone):
    """After masking, whatever the dead filters, their normalization's statistics and the weights that read them were,
    the logits are those of a network in which they are different: nothing passes through a dead channel."""
    featurizer, classifier = _featurizer(backbone), nn.Linear(_featurizer(backbone).n_outputs, 7)
    model = nn.ModuleDict({"featurizer": featurizer, "classifier": classifier}).eval()
    groups = channel_groups(featurizer, classifier)
    alive = {group.name: torch.arange(group.channels) % 2 == 0 for group in groups}
    parameters = dict(model.named_parameters())
    shapes = {name: value.shape for name, value in parameters.items()}
    masks = lower_channels(groups, alive, shapes, torch.device("cpu"))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
        x = torch.randn(2, 3, 32, 32)
        expected = classifier(featurizer(x))
        for group in groups:  # the weights that read dead channels are dead; change them, nothing may happen
            for name in group.readers:
                columns = (~alive[group.name]).repeat_interleave(shapes[name][1] // group.channels)
                parameters[name][:, columns] = 100.0
        assert torch.allclose(classifier(featurizer(x)), expected, atol=1e-4)
        assert not torch.allclose(expected, torch.zeros_like(expected))


def test_channel_groups_of_a_traced_timm_network():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert timm
    featurizer = _featurizer("mobilenetv2_100")
    groups = channel_groups(featurizer, nn.Linear(featurizer.n_outputs, 7))
    assert len(groups) > 16 and all(len(group.readers) for group in groups)


def test_a_network_that_cannot_be_followed_is_refused():
    class Untraceable(networks.Featurizer):
        def features(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    class NoChannels(networks.Featurizer):
        def features(self, x):
            return x.mean((2, 3))

    with pytest.raises(UserError, match="granularity 'weight'"):
        channel_groups(Untraceable(), nn.Linear(3, 2))
    with pytest.raises(UserError, match="no channels"):
        channel_groups(NoChannels(), nn.Linear(3, 2))


def test_costs_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 16, 2))
    positions = count_positions(net, (3, 4, 4))
    assert positions == {"0.weight": 16, "2.weight": 1}
    parameters = dict(net.named_parameters())
    dense = measure_cost(parameters, positions, {})
    assert (dense.parameters, dense.surviving_parameters) == (108 + 128 + 2,) * 2
    assert dense.dense_macs == dense.macs == 108 * 16 + 128
    dead = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    dead[0] = False
    masked = measure_cost(parameters, positions, {"0.weight": dead})
    assert masked.surviving_parameters == dense.parameters - 27
    assert masked.macs == dense.macs - 27 * 16 and masked.dense_macs == dense.dense_macs


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0", "mnist_cnn"])
def test_macs_agree_with_torchs_counter(backbone):
    featurizer = _featurizer(backbone).eval()
    ours = sum(
        dict(featurizer.named_parameters())[name].numel() * used
        for name, used in count_positions(featurizer, (3, 32, 32)).items()
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        featurizer(torch.zeros(1, 3, 32, 32))
    assert 2 * ours == counter.get_total_flops()  # torch counts a multiply-accumulate as two


def test_prunable_weights():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    assert list(prunable_weights(net)) == ["0.weight", "3.weight"]


def _train(name: str, steps: int, **overrides):
    values = hparams.resolve_hparams(name, "ColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).cls((2, 8, 8), 2, 2, values)
    algorithm.total_steps = steps
    history = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = [(torch.randn(8, 2, 8, 8), torch.randint(0, 2, (8,))) for _ in range(2)]
        algorithm.update(batch)
        history.append((algorithm.sparsity(), algorithm.masks(), algorithm.at_final_compression()))
    return algorithm, history


@pytest.mark.parametrize("name", ["Magnitude", "Random"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_pruning_follows_the_schedule_and_never_revives(name, granularity):
    algorithm, history = _train(name, 30, granularity=granularity, sparsity=0.5)
    for step, (sparsity, _, final) in enumerate(history):
        assert sparsity == pytest.approx(algorithm.schedule.at(step, 30), abs=0.01)
        assert final == (step >= 24)
    for (_, earlier, _), (_, later, _) in itertools.pairwise(history):
        for key, mask in later.items():
            assert not (mask & ~earlier[key]).any()
    assert all(torch.equal(mask, history[-1][1][key]) for key, mask in history[25][1].items())


def test_magnitude_prunes_the_smallest():
    algorithm, _ = _train("Magnitude", 2, granularity="weight", sparsity=0.6, prune_start=0.0, prune_end=0.0)
    dense, _ = _train("Magnitude", 1, granularity="weight", sparsity=0.0)
    for key, mask in algorithm.masks().items():
        magnitude = dict(dense.named_parameters())[key].detach().abs()
        assert magnitude[~mask].max() <= magnitude[mask].min()


def test_magnitude_and_random_differ():
    (_, a), (_, b) = _train("Magnitude", 4, prune_end=0.5), _train("Random", 4, prune_end=0.5)
    assert any(not torch.equal(a[-1][1][key], b[-1][1][key]) for key in a[-1][1])


def test_masked_channels_stay_silent_in_the_network():
    algorithm, _ = _train("Magnitude", 12, granularity="channel", sparsity=0.5)
    alive = algorithm.unit_masks["featurizer.conv2"]
    out = F.relu(
        algorithm.featurizer.conv2(
            algorithm.featurizer.bn0(F.relu(algorithm.featurizer.conv1(torch.randn(2, 2, 8, 8))))
        )
    )
    assert not algorithm.featurizer.bn1(out)[:, ~alive].any() and alive.sum() == 64
