"""SNIP and GraSP: every score against derivatives, finite differences or brute force."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from baseline_runs import _batch, _make, _tiny_batch, _update
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning.at_initialization import balanced_batch
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.masks import keep_highest
from domainbed_sfp.pruning.scores import (
    channel_reader_sums,
    channel_sums,
    connection_sensitivity,
    gradient_flow,
    prunable_weights,
)
from domainbed_sfp.training import hparams


def _tiny_network() -> nn.Sequential:
    """A smooth convolutional network in double precision, small enough for one evaluation per weight."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


# SNIP ---------------------------------------------------------------------------------------------------------------


def test_connection_sensitivity_is_the_derivative_in_a_mask():
    """Every weight's multiplicative mask, moved by itself."""
    network, (x, y), epsilon = _tiny_network(), _tiny_batch(), 1e-5
    weights = prunable_weights(network)
    scores = connection_sensitivity(network, weights, x, y)

    @torch.no_grad()
    def loss_with(weight, index, mask):
        value = weight.view(-1)[index].clone()
        weight.view(-1)[index] = value * mask
        loss = F.cross_entropy(network(x), y).item()
        weight.view(-1)[index] = value
        return loss

    assert [scores[name].numel() for name in weights] == [18, 24, 36]
    for name, weight in weights.items():
        for index in range(weight.numel()):
            slope = (loss_with(weight, index, 1 + epsilon) - loss_with(weight, index, 1 - epsilon)) / (2 * epsilon)
            assert scores[name].view(-1)[index].item() == pytest.approx(abs(slope), rel=1e-5, abs=1e-9)


def test_snip_ranks_the_untrained_weights_globally():
    """The first step's mask against gradients and a sort written out here; it stays."""
    algorithm = _make("SNIP", granularity="weight", sparsity=0.7)
    twin = copy.deepcopy(algorithm)
    x, y = (torch.cat(part) for part in zip(*_batch(0)))
    losses = F.cross_entropy(twin.predict(x), y, reduction="none")
    assert y.bincount().tolist() != [8, 8]
    torch.stack([losses[y == label].mean() for label in (0, 1)]).mean().backward()
    names = list(algorithm.unit_shapes)
    parameters = dict(twin.named_parameters())
    flat = torch.cat([(parameters[name] * parameters[name].grad).abs().flatten() for name in names])
    threshold = flat.sort().values[round(0.7 * len(flat)) - 1]
    _update(algorithm, 0)
    masks = algorithm.masks()
    assert torch.equal(torch.cat([masks[name].flatten() for name in names]), flat > threshold)
    assert algorithm.sparsity() == pytest.approx(0.7, abs=1e-4) and algorithm.at_final_compression()
    for step in range(1, 4):
        _update(algorithm, step)
    assert all(torch.equal(mask, masks[name]) for name, mask in algorithm.masks().items())


def test_the_network_that_is_pruned_first_trains_without_its_dead_weights():
    """The loss of the very first step is already the masked network's."""
    algorithm = _make("SNIP", granularity="weight", sparsity=0.9)
    masked = copy.deepcopy(algorithm)
    loss = _update(algorithm, 0)["loss"]
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for name, mask in algorithm.masks().items():
            parameters[name].mul_(mask)
        x, y = (torch.cat(part) for part in zip(*_batch(0)))
        assert loss == pytest.approx(F.cross_entropy(masked.predict(x), y).item(), rel=1e-5)


def test_balanced_batch_by_hand():
    x = torch.arange(9.0).view(9, 1, 1, 1)
    batches = [(x[:5], torch.tensor([0, 0, 0, 2, 2])), (x[5:], torch.tensor([2, 0, 2, 0]))]
    # In turn from both: samples 0 5 1 6 2 7 3 8 4 of classes 0 2 0 0 0 2 2 0 2.
    chosen, y = balanced_batch(batches, 2)
    assert chosen.flatten().tolist() == [0, 5, 1, 7] and y.tolist() == [0, 2, 0, 2]
    chosen, y = balanced_batch([(x[:1], torch.tensor([1]))], 25)
    assert chosen.flatten().tolist() == [0] and y.tolist() == [1]


def test_channel_sums_by_hand():
    group = ChannelGroup("c", 2, ("c.weight", "dw.weight"), (), ())
    scores = {
        "c.weight": torch.tensor([[[[1.0, 2.0]]], [[[-3.0, 0.5]]]]),
        "dw.weight": torch.tensor([[[[4.0]]], [[[5.0]]]]),
    }
    assert channel_sums([group], scores)["c"].tolist() == [7.0, 2.5]


def test_channel_reader_sums_by_hand():
    group = ChannelGroup("c", 2, (), (), ("next.weight", "head.weight"))
    scores = {
        "next.weight": torch.tensor([[[[1.0, 2.0]], [[5.0, 0.5]]], [[[-4.0, 1.0]], [[0.0, 0.25]]]]),
        "head.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),  # two numbers of each channel, channel by channel
    }
    assert channel_reader_sums([group], scores)["c"].tolist() == [0.0 + 3.0, 5.75 + 7.0]


@pytest.mark.parametrize("name", ["SNIP", "GraSP"])
def test_scopes_of_pruning_at_initialization(name):
    assert _make(name, granularity="weight").ranking_scope() == "global"
    assert _make(name, granularity="channel").ranking_scope() == "layer"
    assert _make(name, granularity="channel", pruning_scope="global").ranking_scope() == "global"


def test_a_global_ranking_can_spare_the_best_of_every_layer():
    scores = {"small": torch.tensor([0.0, 0.2, 0.1]), "large": torch.arange(1.0, 8.0)}
    kept = keep_highest(scores, 0.5, "global", spare_best=True)
    assert kept["small"].tolist() == [False, True, False]
    assert kept["large"].tolist() == [False, False, False, True, True, True, True]
    with pytest.raises(UserError, match="'small'"):
        keep_highest(scores, 0.5, "global")


# GraSP --------------------------------------------------------------------------------------------------------------


def test_gradient_flow_against_the_explicit_hessian():
    network, (x, y), temperature = _tiny_network(), _tiny_batch(), 7.0
    weights = prunable_weights(network)
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        parts = (part.view(weight.shape) for part, weight in zip(flat.split(sizes), weights.values()))
        logits = torch.func.functional_call(network, dict(zip(weights, parts)), (x,))
        return F.cross_entropy(logits / temperature, y)

    theta = torch.cat([weight.detach().flatten() for weight in weights.values()])
    gradient = torch.autograd.functional.jacobian(loss, theta)
    hessian = torch.autograd.functional.hessian(loss, theta)
    published = -theta * (hessian @ gradient)  # S, of which the largest go
    scores = torch.cat([score.flatten() for score in gradient_flow(network, weights, x, y, temperature).values()])
    assert torch.allclose(scores, -published, rtol=1e-9, atol=1e-15)
    # The sign, without any derivation: the flow |gradient|^2 changes by 2 S(w) a unit of the way w goes to zero.
    for index in torch.argsort(published)[[0, -1]]:
        step = torch.zeros_like(theta)
        step[index] = -1e-4 * theta[index]
        flows = [torch.autograd.functional.jacobian(loss, theta + side * step).square().sum() for side in (1, -1)]
        assert ((flows[0] - flows[1]) / 2e-4).item() == pytest.approx(2 * published[index].item(), rel=1e-4)


def test_grasps_channels_are_scored_by_what_reads_them():
    """Behind a normalization the sum over a filter would be minus the squared norm of its gradient."""
    algorithm = _make("GraSP", granularity="channel", backbone="mnist_cnn_bn")
    batches = _batch(0)
    x, y = balanced_batch(batches, 25)
    network = copy.deepcopy(algorithm.network)
    weights = {f"featurizer.{key}": value for key, value in prunable_weights(network[0]).items()}
    weights["classifier.weight"] = network[1].weight
    by_weight = gradient_flow(network, weights, x, y, 200.0)
    scores = algorithm.score(batches)
    for group in algorithm.groups:
        (reader,) = group.readers
        assert torch.allclose(scores[group.name], by_weight[reader].transpose(0, 1).flatten(1).sum(1), rtol=1e-4)


def test_grasp_on_networks_without_second_derivatives():
    """Attention has them by one of its kernels; hard sigmoids have none."""
    pytest.importorskip("timm", reason="timm is not installed")
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 2
    for backbone in ("test_vit", "timm:mobilenetv3_small_050"):
        values = hparams.resolve_hparams(
            "GraSP",
            "PACS",
            overrides={"backbone": backbone, "weights": "none", "image_size": 32, "granularity": "weight"},
        )
        algorithm = registry.get("GraSP").cls((3, 32, 32), 2, 2, values)
        algorithm.total_steps = 4
        if backbone == "test_vit":
            algorithm.update([(x, y), (x, y)])
            assert algorithm.sparsity() == pytest.approx(0.5, abs=1e-3)
        else:
            with pytest.raises(UserError, match=r"GraSP needs second derivatives.*hardsigmoid"):
                algorithm.update([(x, y), (x, y)])


def test_grasp_keeps_what_the_gradient_flow_needs():
    """Of the weights, those whose removal would shrink the flow live; 25 samples of a class enter."""
    algorithm = _make("GraSP", granularity="weight", sparsity=0.5)
    network = copy.deepcopy(algorithm.network)
    batch = [(torch.cat([x] * 4), torch.cat([y] * 4)) for x, y in _batch(0)]
    x, y = balanced_batch(batch, 25)
    assert y.bincount().max() == 25
    weights = {f"featurizer.{key}": value for key, value in prunable_weights(network[0]).items()}
    weights["classifier.weight"] = network[1].weight
    scores = gradient_flow(network, weights, x, y, 200.0)
    flat = torch.cat([scores[name].flatten() for name in algorithm.unit_shapes])
    algorithm.update(batch)
    alive = torch.cat([mask.flatten() for mask in algorithm.masks().values()])
    assert flat[alive].min() >= flat[~alive].max()
    assert alive.sum() == len(alive) - round(len(alive) / 2)
