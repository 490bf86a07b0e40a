"""Spurious directions of what layers read, taken out of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.algorithms.sfp.hparams import REMOVAL_ENERGY
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.introspection import uses_weight_as_is
from domainbed_sfp.pruning.directions import ConditionalMoments, remove_directions, spurious_directions
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.state import NamedTensors, attribute_name

# A direction is followed while this much of its length lies on inputs that live.
LIVING = 0.1
# Of a pretrained network the last part only: truncating everything takes what it knows (25 points on PACS: seen).
LAST_PART = 0.25


class Removal(nn.Module):
    """Input directions in which flagged and unflagged samples of a class differ, for each of some layers.

    Args:
        layers: the layers by the names of their weights.
        classes: how many there are.
        rank: share of the possible directions that is taken (see `spurious_directions`).
        relative: whether directions are found among vectors of length 1.
    """

    def __init__(self, layers: Mapping[str, Any], classes: int, rank: float, relative: bool) -> None:
        super().__init__()
        self.channels = {name: layer.weight.shape[1] for name, layer in layers.items()}
        self.rank_fraction = rank
        self.relative = relative
        self.moments = nn.ModuleDict()
        for name, channels in self.channels.items():
            self.moments[attribute_name(name)] = ConditionalMoments(classes, channels, with_energy=True)
        self.stored = NamedTensors({name: torch.zeros(c, c) for name, c in self.channels.items()})
        # The directions on the channels that live, until masks or directions change.
        self.living: dict[str, Tensor] = {}

    def take(self, name: str, vectors: Tensor, labels: Tensor, flags: Tensor) -> None:
        """Takes in what the layer of weight `name` has read: [N, C], averaged over positions."""
        self.moments_of(name).update(F.normalize(vectors, dim=1) if self.relative else vectors, labels, flags)

    def moments_of(self, name: str) -> ConditionalMoments:
        """What is known of the inputs of the layer of weight `name`."""
        moments = self.moments[attribute_name(name)]
        assert isinstance(moments, ConditionalMoments)
        return moments

    def directions(self, name: str) -> Tensor:
        """Orthonormal [k, C]: the directions found last, of the layer of weight `name`."""
        stored = self.stored[name]
        return stored[: int(stored.any(1).sum())]

    @torch.no_grad()
    def renew(self) -> None:
        """Finds the directions of every layer anew."""
        self.living = {}
        for name in self.channels:
            found = spurious_directions(self.moments_of(name), self.rank_fraction, REMOVAL_ENERGY)
            self.stored[name].zero_()
            self.stored[name][: len(found)] = found

    @torch.no_grad()
    def project(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """W <- W (I - P P^T) for every layer's weight, in place; `masks` say by weight what lives."""
        for name in self.channels:
            if name not in self.living:
                self.living[name] = self._on_living_inputs(name, masks.get(name))
            if len(living := self.living[name]):
                weights[name].copy_(remove_directions(weights[name], living))

    def _on_living_inputs(self, name: str, mask: Tensor | None) -> Tensor:
        """Orthonormal [k, C]: the directions as far as they lie on inputs that live.

        With dead inputs in them, zeroing those after the removal would bring part of a direction back.
        """
        directions = self.directions(name)
        if mask is not None:
            directions = directions * mask.transpose(0, 1).flatten(1).any(1)
        _, sizes, living = torch.linalg.svd(directions, full_matrices=False)
        return living[sizes > LIVING]

    def passed_on(self, name: str, layer: Any, x: Tensor) -> Tensor:
        """mean ||W * (P P^T x)||^2 / mean ||x||^2 over samples and positions, where || || is over channels: what the
        layer makes of that part of its input x."""
        directions = self.directions(name)
        if not len(directions):
            return x.new_zeros(())
        x = x.detach().float()  # inner layers have bf16 inputs under autocast
        if isinstance(layer, nn.Linear):
            out = F.linear(x @ directions.t() @ directions, layer.weight)
            return out.square().sum(-1).mean() / x.square().sum(-1).mean().clamp_min(1e-12)
        part = torch.einsum("kc,kd,ndhw->nchw", directions, directions, x)
        out = type(layer).forward(layer, part)  # with the layer's own padding, and without its hooks
        if layer.bias is not None:
            out = out - layer.bias.view(-1, 1, 1)
        return out.square().sum(1).mean() / x.square().sum(1).mean().clamp_min(1e-12)


def cleared_layers(featurizer: nn.Module, groups: Iterable[ChannelGroup], which: str) -> dict[str, nn.Module]:
    """The layers whose directions are removed, by the names of their weights: the first, the last quarter, or all of
    those that mix channels. Raises UserError for one that transforms its weight before it uses it."""
    mixing = _mixing_layers(featurizer, groups)
    count = {"first": 1, "all": len(mixing), "last": max(1, round(LAST_PART * len(mixing)))}[which]
    names = list(mixing)[-count:] if which == "last" else list(mixing)[:count]
    for name in names:
        if not uses_weight_as_is(mixing[name]):
            raise UserError(
                f"SFP cannot take directions out of layer {name!r}: {type(mixing[name]).__name__} transforms its "
                "weight before it uses it; set hparam 'removal' to none, or choose another backbone"
            )
    return {name: mixing[name] for name in names}


def _mixing_layers(featurizer: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, nn.Module]:
    """Full convolutions and linear layers by the names of their weights, in the order of the network; without linear
    layers that read a flattened map, whose inputs are no channels."""
    read = {name: group.channels for group in groups for name in group.readers}
    mixing: dict[str, nn.Module] = {}
    for name, layer in featurizer.named_modules():
        if not (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)):
            continue
        weight = f"featurizer.{name}.weight"
        if read.get(weight, layer.weight.shape[1]) == layer.weight.shape[1]:
            mixing[weight] = layer
    return mixing
