"""Networks, masks and images of made runs."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.deploy import exported
from domainbed_sfp.networks.backbones import BACKBONES
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.pruning.masks import lower_channels
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.training import hparams
from domainbed_sfp.training import train as training

CLASSES = 5


def make(backbone: str, size: int, nonlinear: bool = False) -> nn.Sequential:
    """A network as `export()` gives it, with statistics and affine parameters as training leaves them: none is 0 or 1."""
    if backbone not in BACKBONES.entries:
        pytest.importorskip("timm", reason="the extra `timm` is not installed")
    torch.manual_seed(0)
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": backbone, "weights": "none"})
    featurizer = networks.make_featurizer((3, size, size), values)
    network = nn.Sequential(featurizer, networks.make_classifier(featurizer.n_outputs, CLASSES, nonlinear))
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, size, size))
    return network.eval()


def mask(
    network: nn.Sequential, alive: dict[str, torch.Tensor] | None = None, streams: bool = False
) -> dict[str, torch.Tensor]:
    """Masks that leave the channels `alive` by group name, half of them at random by default; dead weights become 0."""
    groups = channel_groups(network[0], network[1], residual_streams=streams)
    if alive is None:
        alive = {group.name: torch.rand(group.channels).argsort() < -(-group.channels // 2) for group in groups}
    parameters = dict(exported.ExportedNetwork(network[0], network[1]).named_parameters())
    shapes = {name: value.shape for name, value in parameters.items()}
    masks = lower_channels(groups, alive, shapes, torch.device("cpu"))
    with torch.no_grad():
        for name, one in masks.items():
            parameters[name].mul_(one)
    return masks


def images(size: int) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def _train(folder: Path, **arguments: str) -> None:
    args = RunSettings(dataset="FullColoredDigits", test_envs=[2], steps=9, checkpoint_freq=8)
    with contextlib.redirect_stdout(io.StringIO()):
        training.train(replace(args, output_dir=str(folder), **{"algorithm": "Magnitude", **arguments}))
