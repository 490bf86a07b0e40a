"""Squeeze-and-excitation gates: layers that scale each channel by an attention that depends on the input."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.core.errors import UserError

# What a gate may stand behind.
CARRIERS = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)


class ChannelGate(nn.Module):
    """A squeeze-and-excitation gate (Hu et al. 2018): x [N, C, H, W] -> a * x, a = 2 sigmoid(u) in (0, 2).

    u = expand(relu(reduce(x averaged over space))). The second layer begins at zero, so that a = 1: a network into
    which gates are put gives the logits it gave before, to the bit.

    Args:
        channels: C.
        hidden: width of the hidden layer.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # Rounded to bf16 many channels' attention would be the same, and their order is what gates are asked for.
            with torch.autocast(x.device.type, enabled=False):
                attention = self._attention(x.mean((2, 3), dtype=torch.float32))
                return (x * attention.unsqueeze(2).unsqueeze(3)).to(x.dtype)
        return x * self._attention(x.mean((2, 3))).unsqueeze(2).unsqueeze(3)

    def _attention(self, pooled: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))


def put_gate(network: nn.Module, place: str, hidden: int) -> None:
    """Puts a gate behind the layer `place` of `network`, in place: the layer L becomes a sequence of `layer` (L) and
    `gate`. Raises UserError where there is no convolution, BatchNorm or GroupNorm of that name."""
    try:
        layer: Any = network.get_submodule(place)
    except AttributeError:
        layer = None
    if not isinstance(layer, CARRIERS):
        kind = "nothing of that name" if layer is None else type(layer).__name__
        raise UserError(f"a gate stands behind a convolution or its normalization; {place!r} is {kind}")
    parent, _, name = place.rpartition(".")
    gate = ChannelGate(len(layer.weight), hidden)
    setattr(network.get_submodule(parent), name, nn.Sequential(OrderedDict(layer=layer, gate=gate)))


@torch.no_grad()
def fold_constant_gates(network: nn.Module) -> list[str]:
    """Multiplies gates that do not depend on their input into the layers they stand behind, in place, and takes them
    out. Returns the names of those layers.

    Attention is 2 sigmoid(bias) where no hidden unit reaches `expand` with a weight that is not zero, of those that
    `reduce` can make positive: through a weight, or through its bias alone, which then adds a constant.
    """
    folded = []
    for name, carrier in list(network.named_modules()):
        gate = getattr(carrier, "gate", None)
        if not isinstance(gate, ChannelGate) or (constant := _constant_logits(gate)) is None:
            continue
        layer: Any = carrier.layer
        factors = 2 * torch.sigmoid(constant)
        layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(factors)
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, layer)
        folded.append(name)
    return folded


def _constant_logits(gate: ChannelGate) -> Tensor | None:
    """The logits [C] of a gate whose attention is the same for all inputs, else None."""
    heard = gate.expand.weight.any(0)
    depends = gate.reduce.weight.any(1)
    if bool((heard & depends).any()):
        return None
    hidden = F.relu(gate.reduce.bias).masked_fill(depends, 0)
    return gate.expand.weight @ hidden + gate.expand.bias


def gate_widths(network: nn.Module) -> dict[str, int]:
    """The hidden width of every gate of a network, by the name of the layer that `put_gate` put it behind."""
    return {
        name.removesuffix(".gate"): module.expand.in_features
        for name, module in network.named_modules()
        if isinstance(module, ChannelGate)
    }
