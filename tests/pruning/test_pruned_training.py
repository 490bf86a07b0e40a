"""Runs that prune: schedules are followed, nothing is revived."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_networks import _train

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.costs import sparsities_of
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.training import hparams


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


def test_residual_streams_are_pruned_where_asked():
    values = hparams.resolve_hparams(
        "Magnitude",
        "PACS",
        overrides={"backbone": "resnet18", "weights": "none", "prune_residual_streams": True, "prune_end": 0.3},
    )
    algorithm = registry.get("Magnitude").cls((3, 32, 32), 7, 2, values)
    algorithm.total_steps = 4
    for _ in range(4):
        algorithm.update([(torch.randn(4, 3, 32, 32), torch.randint(0, 7, (4,))) for _ in range(2)])
    assert algorithm.sparsity() == 0.5 and all(int(mask.sum()) * 2 == len(mask) for mask in (
        algorithm.unit_masks[group.name] for group in algorithm.groups
    ))  # fmt: skip
    network = algorithm.featurizer.network
    dead = ~algorithm.unit_masks[algorithm.groups[0].name]
    network.eval()
    assert not network.layer1(network.maxpool(F.relu(network.bn1(network.conv1(torch.randn(2, 3, 32, 32))))))[
        :, dead
    ].any()


def test_masks_of_an_algorithm_that_brings_its_own_are_counted_with_residual_streams_only_where_they_are_pruned():
    """A method without `groups`: what a channel's sparsity is a fraction of follows from its masks."""
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": "resnet18", "weights": "none"})
    network = torch.nn.Module()
    network.featurizer = networks.make_featurizer((3, 32, 32), values)
    network.classifier = torch.nn.Linear(network.featurizer.n_outputs, 7)
    network.granularity = "channel"
    parameters = dict(network.named_parameters())
    for streams in (False, True):
        groups = channel_groups(network.featurizer, network.classifier, residual_streams=True)
        total = sum(group.channels for group in groups if streams or not group.is_residual)
        masks = {}
        for group in groups:
            if group.is_residual == streams:
                for name in group.filters:
                    masks[name] = torch.ones_like(parameters[name], dtype=torch.bool)
                    masks[name][::2] = False
        dead = sum(group.channels // 2 for group in groups if group.is_residual == streams)
        assert sparsities_of(network, masks) == {"channel": pytest.approx(dead / total)}


def test_residual_streams_that_cannot_be_pruned():
    with pytest.raises(UserError, match="'prune_residual_streams' is about channels: it needs granularity 'channel'"):
        _train("Magnitude", 1, granularity="weight", prune_residual_streams=True)
    with pytest.raises(UserError, match="'prune_residual_streams': MNIST_CNN has no residual streams"):
        _train("MRM", 1, granularity="channel", prune_residual_streams=True)
    for name in ("RigL", "EVIL", "GlobalPru"):  # of single weights, or of channels inside blocks
        with pytest.raises(UserError, match="prune_residual_streams"):
            hparams.resolve_hparams(name, "PACS", overrides={"prune_residual_streams": True})
