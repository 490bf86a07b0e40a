"""What layers read while SFP trains, and the scores of channels that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.directions import ConditionalMoments
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.state import NamedTensors, attribute_name

# Scores from gradients, `taylor` and `unflagged`, are averaged over the steps with this factor.
GRADIENT_MOMENTUM = 0.9


class ChannelScores(nn.Module):
    """The score of every channel, the lowest go first.

    class_conditional: minus how well the channel tells flagged from unflagged samples of a class, where it is read. At
    the last reader: there a residual stream holds what all its layers have written.
    taylor: Molchanov et al.'s (`pruning.scores.channel_taylor`), over the steps.
    unflagged: the mean over unflagged samples of (dL/dz)^2, z a gate on all that later layers read of the channel for
    one sample, over the steps. Over all samples that is Fisher pruning (Theis et al. 2018, arXiv 1801.05787).

    Args:
        kind: one of the three.
        groups: whose channels are scored.
        classes: how many there are.
    """

    def __init__(self, kind: str, groups: Sequence[ChannelGroup], classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.groups = groups
        self.moments = nn.ModuleDict()
        self.averages = NamedTensors({})
        if kind == "class_conditional":
            self.moments.update(
                {attribute_name(g.readers[-1]): ConditionalMoments(classes, g.channels) for g in groups}
            )
        else:
            self.averages = NamedTensors({group.name: torch.zeros(group.channels) for group in groups})

    def watched(self) -> dict[str, int]:
        """Of the layers whose inputs `take` wants to see: how many channels they read, by the name of their weight."""
        return {g.readers[-1]: g.channels for g in self.groups} if self.kind == "class_conditional" else {}

    def sensitive(self) -> set[str]:
        """The weights of the layers for whose inputs `take_unflagged` wants derivatives."""
        return {name for g in self.groups for name in g.readers} if self.kind == "unflagged" else set()

    def take(self, name: str, vectors: Tensor, labels: Tensor, flags: Tensor) -> None:
        """Takes in what the layer of weight `name` has read: [N, channels], averaged over positions."""
        moments = self.moments[attribute_name(name)]
        assert isinstance(moments, ConditionalMoments)
        moments.update(vectors, labels, flags)

    @torch.no_grad()
    def take_taylor(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes in the gradients that parameters hold."""
        for name, value in scores.by_group(scores.channel_taylor, self.groups, parameters).items():
            self.averages[name].lerp_(value, 1 - GRADIENT_MOMENTUM)

    @torch.no_grad()
    def take_unflagged(self, seen: LayerInputs, unflagged: Tensor) -> None:
        """Takes in derivatives by each sample's gates; `unflagged` [N] says which samples count."""
        if not unflagged.any():
            return
        for group in self.groups:
            parts = [seen.sensitivity(name, group.channels, len(unflagged)) for name in group.readers]
            mean = torch.stack(parts).sum(0)[unflagged].square().mean(0)
            self.averages[group.name].lerp_(mean, 1 - GRADIENT_MOMENTUM)

    def scores(self) -> scores.Scores:
        """[channels] by group name."""
        if self.kind != "class_conditional":
            return {name: value.clone() for name, value in self.averages.as_dict().items()}
        found = {}
        for group in self.groups:
            moments = self.moments[attribute_name(group.readers[-1])]
            assert isinstance(moments, ConditionalMoments)
            found[group.name] = -moments.spuriousness()
        return found


class LayerInputs(AbstractContextManager["LayerInputs"]):
    """Collects, while it lasts, what layers read; of some of them also, in the backward pass that follows, how the loss
    answers to it.

    Args:
        layers: by the names of their weights.
        sensitive: the names of those whose inputs' derivatives are wanted.
    """

    def __init__(self, layers: Mapping[str, nn.Module], sensitive: set[str]) -> None:
        self.layers = layers
        self.sensitive = sensitive
        self.inputs: dict[str, Tensor] = {}
        # By layer, for each of its calls: [N, D], the loss's derivative by a gate on each of D parts of the input.
        self.derivatives: dict[str, list[Tensor | None]] = {name: [] for name in self.sensitive}
        self.handles: list[Any] = []

    def __enter__(self) -> LayerInputs:
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_pre_hook(self._note(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def sensitivity(self, name: str, channels: int, images: int) -> Tensor:
        """After the backward pass: [images, channels], each sample's derivative of the loss by a gate z = 1 on what
        layer `name` reads of a channel, which is the sum of x dL/dx over all that it reads of it."""
        calls = torch.cat([call for call in self.derivatives[name] if call is not None])
        return calls.unflatten(0, (images, -1)).sum(1).unflatten(1, (channels, -1)).sum(2)

    def by_image(self, name: str, images: int) -> Tensor:
        """What layer `name` has read, with one row an image."""
        return by_image(self.inputs[name], self.layers[name], images)

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = inputs[0]
            self.inputs[name] = x
            if name not in self.sensitive or not x.requires_grad:
                return None
            own = x.view_as(x)  # others may read x too, and the gradient of x would be that of all of them
            own.register_hook(self._differentiate(name, x.detach()))
            return (own, *inputs[1:])

        return note

    def _differentiate(self, name: str, x: Tensor) -> Callable[[Tensor], None]:
        calls = self.derivatives[name]
        place = len(calls)
        calls.append(None)
        # Channels come second where a convolution reads, and last where a linear layer does.
        positions = tuple(range(2, x.dim()) if isinstance(self.layers[name], nn.Conv2d) else range(1, x.dim() - 1))

        def differentiate(gradient: Tensor) -> None:
            product = gradient.float() * x.float()
            calls[place] = product.sum(positions) if positions else product

        return differentiate


def by_image(x: Tensor, layer: nn.Module, images: int) -> Tensor:
    """What `layer` reads, with one row an image: windows that an image was cut into are put side by side."""
    if len(x) == images:
        return x
    if isinstance(layer, nn.Conv2d):
        return x.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)
    return x.reshape(images, -1, x.shape[-1])


def channel_means(x: Tensor, layer: nn.Module, channels: int) -> Tensor:
    """What `layer` reads, averaged over positions: [N, channels] of [N, C, H, W], or of [N, ..., C] where it is linear.

    A flattened map holds several numbers of each channel, channel by channel.
    """
    if isinstance(layer, nn.Conv2d):
        return x.mean((2, 3))
    vectors = x.flatten(1, -2).mean(1) if x.dim() > 2 else x
    return vectors.unflatten(1, (channels, -1)).mean(2)
