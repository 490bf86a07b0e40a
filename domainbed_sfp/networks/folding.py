"""A BatchNorm that is frozen is part of the convolution in front of it.

In evaluation mode BatchNorm is a factor and a shift for each channel. Convolution and BatchNorm are then one
convolution with the weights W' = W gamma / sqrt(var + eps) and the bias b' = beta + (b - mean) gamma / sqrt(var + eps).
W' and b' are computed from the parameters in every forward pass, so that the gradients reach W, gamma and beta; what is
saved is a pass over every feature map, and another on the way back. Values and gradients are the same up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp.networks.introspection import LayerTracer, uses_weight_as_is

# timm's BatchNorm with an activation behind it, by name: timm need not be installed.
_TIMM_BATCHNORM = "BatchNormAct2d"


class Folding:
    """Remembers which convolutions of a network have a BatchNorm behind them (see `find_pairs`)."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """While it lasts, each of these convolutions gives what its BatchNorm would make of it, and the BatchNorm
        passes that on. A pair stays as it is where the BatchNorm trains, or where hooks want to see between the two;
        so does a network that is being exported."""
        folded = [] if torch.compiler.is_compiling() else [pair for pair in self.of(network) if _is_foldable(*pair)]
        try:
            # Attributes of the objects, which hide parameters and method as long as they are there.
            for convolution, norm in folded:
                weight, bias = folded_parameters(convolution, norm)
                vars(convolution).update(weight=weight, bias=bias)
                vars(norm)["forward"] = _passing(norm)
            yield
        finally:
            for convolution, norm in folded:
                vars(convolution).pop("weight", None)
                vars(convolution).pop("bias", None)
                vars(norm).pop("forward", None)

    def of(self, network: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The pairs of `network`, found anew where layers have been put in or taken out: gates, quantizers."""
        modules = list(network.modules())
        if len(modules) != len(self.modules) or any(new is not old for new, old in zip(modules, self.modules)):
            self.modules, self.pairs = modules, find_pairs(network)
        return self.pairs


def find_pairs(network: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution of `network` whose output goes to a BatchNorm and nowhere else, with that BatchNorm; both are
    called once. Empty where torch.fx cannot trace the network."""
    try:
        graph = LayerTracer("forward").trace(network)
    except Exception:  # whatever a network's own code raises on values that are not there
        return []
    modules = dict(network.named_modules())
    layer_of = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    calls = Counter(id(layer) for layer in layer_of.values())
    pairs = []
    for node, norm in layer_of.items():
        source: Any = node.args[0] if node.args else None
        convolution = layer_of.get(source)
        if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        kind = type(norm)
        is_known = kind is nn.BatchNorm2d or (kind.__module__.startswith("timm.") and kind.__name__ == _TIMM_BATCHNORM)
        if is_known and len(source.users) == 1 and calls[id(convolution)] == calls[id(norm)] == 1:
            pairs.append((convolution, norm))
    return pairs


def folded_parameters(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(W', b') of the one convolution that both are, differentiable in the parameters of both."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = norm.weight * scale
    mean = norm.running_mean if convolution.bias is None else norm.running_mean - convolution.bias
    bias = torch.addcmul(norm.bias, mean, scale, value=-1) if norm.affine else -mean * scale
    return convolution.weight * scale.view(-1, 1, 1, 1), bias


def _is_foldable(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    between = (
        convolution._forward_hooks,
        convolution._backward_hooks,
        convolution._backward_pre_hooks,
        norm._forward_pre_hooks,
        norm._backward_hooks,
        norm._backward_pre_hooks,
    )
    return (
        not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and uses_weight_as_is(convolution)
        and "forward" not in vars(norm)
        and not any(between)
    )


def _passing(norm: nn.Module) -> Any:
    """What is left of a BatchNorm that is folded: nothing, or timm's dropout and activation."""
    if type(norm) is nn.BatchNorm2d:
        return _identity
    rest: Any = norm
    return lambda x: rest.act(rest.drop(x))


def _identity(x: Tensor) -> Tensor:
    return x
