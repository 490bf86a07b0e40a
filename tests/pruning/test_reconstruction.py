"""Channels that remain take over from those that go: least squares, and the optimal brain surgeon that counts on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning.obs import removal_errors
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.reconstruction import (
    InputMoments,
    ReaderInputs,
    Reconstruction,
    Told,
    channel_rows,
    reconstruct,
)
from domainbed_sfp.pruning.state import Masks
from domainbed_sfp.training.hparams import resolve_hparams


class Network(nn.Module):
    """A reader of three channels, with what may stand behind it."""

    def __init__(self, *layers):
        super().__init__()
        self.featurizer = nn.Sequential(*layers)

    def forward(self, x):
        return self.featurizer(x)


def lose_the_last(network, x, channels=3):
    """What `network` makes of `x` before and after its last channel is gone, with and without reconstruction."""
    reader = "featurizer.0.weight"
    group = ChannelGroup("group", channels, (), (), (reader,))
    before = network(x)
    reconstruction = Reconstruction(network, [group])
    for _ in range(3):
        with reconstruction.watch(network, True) as seen:
            network(x)
        reconstruction.take(seen)
    alive = torch.ones(channels, dtype=torch.bool)
    alive[-1] = False
    weight = network.get_parameter(reader).data
    parts = weight.view(len(weight), channels, -1)
    kept = parts[:, -1].clone()
    parts[:, -1] = 0
    without = network(x)
    parts[:, -1] = kept
    reconstruction.take_over(network, Masks({"group": torch.Size([channels])}), {"group": alive})
    parts[:, -1] = 0
    return before, without, network(x)


def dependent(*shape):
    """Inputs whose channel 2 is 2 h0 - h1 + 3."""
    free = torch.rand(shape[0], 2, *shape[1:]) + 0.5
    return torch.cat([free, 2 * free[:, :1] - free[:, 1:] + 3], 1)


FROZEN = nn.BatchNorm2d(4).eval()


@pytest.mark.parametrize(
    "layers, x",
    [
        ([nn.Linear(3, 4)], dependent(200)),
        ([nn.Conv2d(3, 4, 1)], dependent(50, 5, 5)),
        ([nn.Conv2d(3, 4, 1, bias=False), FROZEN], dependent(50, 5, 5)),
        ([nn.Conv2d(3, 4, 3)], dependent(50, 5, 5)),
        ([nn.Linear(12, 4)], dependent(50, 2, 2).flatten(1)),
    ],
    ids=["linear", "bias", "norm", "kernel", "flattened"],
)
def test_a_channel_that_others_and_a_constant_determine_is_lost_without_a_trace(layers, x):
    torch.manual_seed(0)
    before, without, after = lose_the_last(Network(*layers), x)
    assert (without - before).abs().mean() > 0.2
    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_without_a_place_for_it_the_constant_is_left_out():
    """h1 = 2 h0 + 1 with h0 = 1 and 3: the best multiple is E[h0 h1] / E[h0^2] = 12 / 5."""
    x = torch.tensor([[1.0, 3.0], [3.0, 7.0]])
    network = Network(nn.Linear(2, 1, bias=False))
    w = network.featurizer[0].weight.data.clone()
    _, _, after = lose_the_last(network, x, 2)
    assert torch.allclose(after, x[:, :1] * (w[0, 0] + 2.4 * w[0, 1]), rtol=2e-3)


def test_what_is_dead_already_has_no_say_and_strangers_take_nothing_over():
    weight, shift = torch.randn(4, 3, 1, 1), torch.randn(4)
    unchanged, moments = weight.clone(), torch.eye(4)
    # Channel 2 was dead, channel 1 goes; channels that have nothing in common take nothing over.
    weight[:, 2] = 0
    after = reconstruct(weight, shift, moments, torch.tensor([True, False, False]))
    assert torch.allclose(weight[:, :2], unchanged[:, :2], atol=1e-6) and torch.allclose(after, shift, atol=1e-6)


def test_a_network_that_follows_another_makes_what_that_one_makes():
    """What reached the layer has become half as much plus 1, and channel 1 is gone, which was twice channel 0."""
    g = torch.randn(500, 1) @ torch.tensor([[4.0, 8.0]])
    h = g / 2 + 1
    moments, cross = InputMoments({"a": 2}), InputMoments({"a": 2})
    moments.update("a", h)
    cross.update("a", h, None, g)
    other, weight, shift = torch.tensor([[3.0, 4.0]]), torch.tensor([[9.0, 9.0]]), torch.tensor([5.0])
    told = Told(other, torch.tensor([10.0]), cross["a"])
    shift = reconstruct(weight, shift, moments["a"], torch.tensor([True, False]), told)
    # 3 g0 + 4 g1 + 10 = 11 g0 + 10 = 22 h0 - 22 + 10
    assert weight[0, 0].item() == pytest.approx(22, rel=0.02) and shift.item() == pytest.approx(-12, rel=0.05)


def test_moments_are_those_of_the_inputs_and_weights_count():
    x = torch.randn(6, 3)
    moments = InputMoments({"classifier": 3})
    moments.update("classifier", x)
    assert torch.allclose(moments["classifier"][:3, :3], 0.05 * x.t() @ x / 6, atol=1e-6)
    assert torch.allclose(moments["classifier"][3], 0.05 * torch.cat([x.mean(0), torch.ones(1)]), atol=1e-6)
    one, other = InputMoments({"c": 3}), InputMoments({"c": 3})
    one.update("c", x, torch.tensor([2.0, 0.0, 0.0]))  # two rows a sample
    other.update("c", x[:2])
    assert torch.allclose(one["c"], other["c"], atol=1e-6)


def test_rows_are_channels():
    flat = torch.arange(6.0).view(1, 6)  # two channels with three positions each
    assert channel_rows(flat, nn.Linear(6, 1), 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    maps = torch.arange(8.0).view(1, 2, 2, 2)
    assert channel_rows(maps, nn.Conv2d(2, 1, 1), 2).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    tokens = torch.arange(6.0).view(1, 3, 2)
    assert channel_rows(tokens, nn.Linear(2, 1), 2).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_inputs_are_collected_while_asked():
    layer = nn.Linear(3, 2)
    with ReaderInputs({"layer": layer}) as seen:
        layer(torch.ones(4, 3, requires_grad=True))
    layer(torch.zeros(4, 3))
    (inputs,) = seen.inputs["layer"]
    assert inputs.shape == (4, 3) and not inputs.requires_grad and inputs.sum() == 12


def test_the_surgeon_finds_the_best_pair_where_magnitudes_mislead():
    """Channels 0 and 1 are nearly the same and read with the largest weights: one of them can go for nothing."""
    weight = torch.tensor([[3.0, 3.0, 1.0]])
    moments = torch.tensor([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    errors = removal_errors([(weight, moments)], 2)
    # Of W h, 9 + 9 + 2 * 9 * .99 + 1 = 36.82: first 9 (1 - .99^2), then 1; what remains has no say.
    assert errors.tolist() == pytest.approx([9 * (1 - 0.99**2) / 36.82, float("inf"), 1 / 36.82])


def test_the_error_of_a_removal_is_that_of_least_squares():
    torch.manual_seed(0)
    x, weight = torch.randn(100, 6) @ torch.randn(6, 6), torch.randn(2, 6)
    x = torch.cat([x + 1, torch.ones(100, 1)], 1).double()
    moments = x.t() @ x / 100
    errors = removal_errors([(weight, moments)], 1)
    gone = int(errors.argmin())
    kept = [j for j in range(7) if j != gone]
    wanted = x[:, :6] @ weight.double().t()
    fit = x[:, kept] @ torch.linalg.lstsq(x[:, kept], wanted).solution
    energy = wanted.square().sum(1).mean()
    assert errors[gone].item() == pytest.approx(((fit - wanted).square().sum(1).mean() / energy).item())


def test_errors_of_several_readers_add_up():
    weights = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
    eye = torch.eye(2, dtype=torch.float64)
    assert removal_errors([(w, eye) for w in weights], 1).tolist() == pytest.approx([1 / 5 + 4 / 5, float("inf")])


def made(name, **changes):
    torch.manual_seed(0)
    hparams = resolve_hparams(name, "FullColoredDigits", overrides={"backbone": "mnist_cnn_bn", **changes})
    algorithm = registry.get(name).cls((3, 8, 8), 10, 2, hparams)
    algorithm.total_steps = 40
    return algorithm


def batches(step):
    made_by = torch.Generator().manual_seed(step)
    labels = [torch.randint(0, 10, (32,), generator=made_by) for _ in range(2)]
    return [(torch.rand(32, 3, 8, 8, generator=made_by) + y.view(-1, 1, 1, 1) / 5, y) for y in labels]


@pytest.mark.parametrize("name", ["Random", "Magnitude", "Taylor", "SFPAligned", "GlobalPru"])
def test_every_scheduled_method_reconstructs_if_asked(name):
    one, two = (made(name, reconstruction=which) for which in ("least_squares", "none"))
    for algorithm in (one, two):
        algorithm.ramp_updates = 20
        while algorithm.sparsity() == 0:
            torch.manual_seed(algorithm.step)
            algorithm.update(batches(algorithm.step))
    assert not torch.equal(one.featurizer.conv2.weight, two.featurizer.conv2.weight)
    for algorithm in (one, two):  # layers that follow the reference lose their channels one after another
        while name == "SFPAligned" and not algorithm.at_final_compression():
            torch.manual_seed(algorithm.step)
            algorithm.update(batches(algorithm.step))
    assert one.sparsity() == two.sparsity() > 0


def test_single_weights_are_not_reconstructed():
    with pytest.raises(UserError, match=r"reconstruction.*granularity 'channel'"):
        made("Magnitude", granularity="weight", reconstruction="least_squares")


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_surgeon_reaches_its_sparsity_and_the_dead_stay_dead(scope):
    algorithm = made("OBS", pruning_scope=scope)
    alive = algorithm.unit_masks.as_dict()
    for step in range(40):
        algorithm.update(batches(step))
        now = algorithm.unit_masks.as_dict()
        assert not any((now[name] & ~alive[name]).any() for name in now)
        alive = now
    assert algorithm.sparsity() == pytest.approx(0.5, abs=0.01) and algorithm.at_final_compression()
