"""What can be said of a network's layers from outside: how they call each other, and what they do to their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from domainbed_sfp.networks.channel_gates import ChannelGate
from domainbed_sfp.networks.convolutions import DepthwiseConv2d, SameConv2d

# timm's layers that use their weight as it is, by name: timm need not be installed.
_TIMM_LAYERS = {"Conv2dSame", "Linear"}


class LayerTracer(fx.Tracer):
    """Traces down to layers that own channels, whatever package defines them."""

    LAYERS = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, ChannelGate)

    def __init__(self, method: str) -> None:
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.LAYERS) or super().is_leaf_module(module, qualified_name)


def uses_weight_as_is(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """True for a convolution or linear layer that multiplies by its parameter `weight` itself.

    Where a layer standardises or otherwise transforms the weight first, a zero in the parameter is none in the
    arithmetic: masks would not prune.
    """
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or module._parameters.get("weight") is None:
        return False  # a parametrized weight is no parameter
    kind: Any = type(module)
    if kind.__module__.startswith("timm.") and kind.__name__ in _TIMM_LAYERS:
        return True
    if isinstance(module, nn.Linear):
        return kind.forward is nn.Linear.forward
    arithmetic = (nn.Conv2d._conv_forward, DepthwiseConv2d._conv_forward)
    return kind._conv_forward in arithmetic and kind.forward in (nn.Conv2d.forward, SameConv2d.forward)


@torch.no_grad()
def batchnorm_of_one_value(
    network: nn.Module, input_shape: tuple[int, ...], forward: Callable[[Tensor], Tensor]
) -> str | None:
    """The name of the first BatchNorm in training mode that has a single value a channel for one image of shape
    (channels, height, width); None where there is none. `forward` is what is called."""
    found: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                found.append(name)

        return hook

    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    ]
    handles = [layer.register_forward_pre_hook(check(name)) for name, layer in layers]
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        forward(torch.zeros(1, *input_shape, device=next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return found[0] if found else None
