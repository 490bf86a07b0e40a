"""Scores: functions from a network to one number per weight or per channel; the lowest go first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from domainbed_sfp.pruning.structure import ChannelGroup

# By parameter name (one score a weight) or by channel group (one score a channel).
Scores = dict[str, Tensor]


def weight_magnitude(parameters: Mapping[str, Tensor]) -> Scores:
    """|w| of every weight."""
    return {name: weight.detach().abs() for name, weight in parameters.items()}


def channel_magnitude(groups: Iterable[ChannelGroup], parameters: Mapping[str, Tensor]) -> Scores:
    """L2 norm of the filters that produce each channel (Li et al. 2017 with L2), over all producers of a group."""
    return {
        group.name: torch.stack(
            [parameters[name].detach().float().flatten(1).square().sum(1) for name in group.filters]
        )
        .sum(0)
        .sqrt()
        for group in groups
    }


def random_like(shapes: Mapping[str, torch.Size], device: torch.device) -> Scores:
    """Uniform scores, drawn on the CPU so that every device prunes the same."""
    return {name: torch.rand(shape).to(device) for name, shape in shapes.items()}


def prunable_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that unstructured pruning may remove: of convolutions and linear layers, by parameter name."""
    return {
        f"{name}.weight" if name else "weight": layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }
