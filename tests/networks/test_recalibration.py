"""BatchNorm recalibration on numbers computed by hand, and where it must not act."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from domainbed_sfp.algorithms.pruning import scheduled as scheduled_pruning
from domainbed_sfp.networks.recalibration import recalibrate_batchnorm
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.training import train as training
from domainbed_sfp.training.setup import RECALIBRATION_BATCHES


def test_statistics_are_the_averages_over_the_batches():
    net = nn.Sequential(nn.BatchNorm2d(1))
    net[0].running_mean.fill_(50.0)
    batches = [torch.tensor([0.0, 2.0]).view(2, 1, 1, 1), torch.tensor([4.0, 10.0]).view(2, 1, 1, 1)]
    recalibrate_batchnorm(net, net, batches)
    assert net[0].running_mean.item() == 4.0  # means 1 and 7
    assert net[0].running_var.item() == 10.0  # unbiased variances 2 and 18
    assert net[0].momentum == 0.1


def test_frozen_statistics_and_weights_stay():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    net[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    recalibrate_batchnorm(net, net, [torch.randn(8, 1, 4, 4)])
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_no_batch_is_read_without_batchnorm():
    def unread():
        raise AssertionError("a batch was read")
        yield

    net = nn.Sequential(nn.GroupNorm(1, 4))
    recalibrate_batchnorm(net, net, unread())


@pytest.mark.parametrize("objective, images", [("ERM", 16), ("GroupDRO", 8), ("CORAL", 8)])
def test_batchnorm_is_recalibrated_on_what_it_has_seen_in_training(objective, images, tmp_path, monkeypatch):
    """All environments together, or one at a time where the objective runs the network so."""
    seen = []

    def note(network, forward, batches):
        seen.extend(len(batch) for batch in batches)

    monkeypatch.setattr(scheduled_pruning, "recalibrate_batchnorm", note)
    overrides = {"backbone": "mnist_cnn_bn", "batch_size": 8, "objective": objective}
    training.train(
        RunSettings(
            dataset="FullColoredDigits", algorithm="Magnitude", test_envs=[2], steps=3, checkpoint_freq=3,
            skip_model_save=True, output_dir=str(tmp_path / "run"), hparams=json.dumps(overrides),
        )
    )  # fmt: skip
    evaluations = 2  # after the first step and the last
    assert set(seen) == {images} and sum(seen) == evaluations * RECALIBRATION_BATCHES * 16
