"""Scores: functions from a network to one number per weight or per channel; the lowest go first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.introspection import uses_weight_as_is
from domainbed_sfp.pruning.groups import ChannelGroup

# By parameter name (one score a weight) or by channel group (one score a channel).
Scores = dict[str, Tensor]


class ChannelScore(Protocol):
    """What every channel of a group is worth; the lowest go first."""

    def __call__(self, group: ChannelGroup, parameters: Mapping[str, Tensor], /) -> Tensor:
        """[group.channels], finite or infinite. `parameters` are all of the algorithm's, by name; their `grad` is that
        of the loss of the step behind which masks are renewed."""


class WeightScore(Protocol):
    """What every weight of a layer is worth; the lowest go first."""

    def __call__(self, weight: Tensor, /) -> Tensor:
        """Of the weight's shape. Its `grad` is as in `ChannelScore`."""


def by_group(score: ChannelScore, groups: Iterable[ChannelGroup], parameters: Mapping[str, Tensor]) -> Scores:
    """The scores of all groups' channels, by group name."""
    return {group.name: score(group, parameters).detach() for group in groups}


def by_weight(score: WeightScore, weights: Mapping[str, Tensor]) -> Scores:
    """The scores of all weights, by parameter name."""
    return {name: score(weight).detach() for name, weight in weights.items()}


def weight_magnitude(weight: Tensor) -> Tensor:
    """|w| of every weight."""
    return weight.abs()


def channel_magnitude(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of the filters that produce each channel (Li et al. 2017 with L2), over all producers of a group."""
    squares = [parameters[name].detach().float().flatten(1).square().sum(1) for name in group.filters]
    return torch.stack(squares).sum(0).sqrt()


def channel_sums(groups: Iterable[ChannelGroup], weight_scores: Mapping[str, Tensor]) -> Scores:
    """Sum of the scores of all weights in the filters that produce each channel, over all producers of a group."""
    return {
        group.name: torch.stack([weight_scores[name].flatten(1).sum(1) for name in group.filters]).sum(0)
        for group in groups
    }


def channel_reader_sums(groups: Iterable[ChannelGroup], weight_scores: Mapping[str, Tensor]) -> Scores:
    """Sum of the scores of all weights that read each channel, over all readers of a group."""
    # [channels * k]: a layer behind a flattened map reads several numbers of a channel, a kernel several taps.
    return {
        group.name: torch.stack(
            [weight_scores[name].sum(0).flatten().view(group.channels, -1).sum(1) for name in group.readers]
        ).sum(0)
        for group in groups
    }


def weight_taylor(weight: Tensor) -> Tensor:
    """(g w)^2 of every weight, from the gradient g that it holds: the squared first-order change of the loss when the
    weight is set to zero (Molchanov et al. 2019, section 3)."""
    return (weight * _gradient(weight)).detach().square()


def channel_taylor(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """(dL/dz)^2 of a gate z = 1 that scales all that later layers read of a channel (Molchanov et al. 2019, section 3):
    the square of the sum of g w over the weights that read it, from the gradients that the parameters hold.

    Over the weights of a filter in front of a normalization that sum is zero, whatever the channel is worth: scaling
    the filter changes nothing. Gates therefore stand behind the normalization, as in the paper's experiments.
    """
    products = {name: (parameters[name] * _gradient(parameters[name])).detach() for name in group.readers}
    return channel_reader_sums([group], products)[group.name].square()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def connection_sensitivity(network: nn.Module, weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Scores:
    """|dL/dm| at m = 1 where a mask m multiplies each weight, which is |w dL/dw| (SNIP, Lee et al. 2019, eq. 5), for
    the cross-entropy L of `network` on images x with classes y, all classes that occur counting alike. `weights` are
    parameters of `network`."""
    logits = network(x)
    class_weights = F.one_hot(y, logits.shape[1]).sum(0).clamp_min(1).to(logits.dtype).reciprocal()
    loss = F.cross_entropy(logits, y, class_weights)
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {name: (weight * gradient).detach().abs() for (name, weight), gradient in zip(weights.items(), gradients)}


def gradient_flow(
    network: nn.Module, weights: Mapping[str, Tensor], x: Tensor, y: Tensor, temperature: float
) -> Scores:
    """w (H g), half of what the gradient's squared norm loses with each weight, to first order (GraSP, Wang et al.
    2020, section 4): the negative of their score S = -w (H g), of which the largest go.

    g and H are gradient and Hessian, with respect to `weights`, of the cross-entropy of logits / `temperature` on
    images x with classes y.

    Raises:
        UserError: for a network with an operation that torch cannot differentiate twice.
    """
    values = list(weights.values())
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
        loss = F.cross_entropy(network(x) / temperature, y)
        gradients = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
        product = torch.stack([(gradient.detach() * gradient).sum() for gradient in gradients]).sum()
        try:
            curved = torch.autograd.grad(product, values, materialize_grads=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise UserError(
                f"GraSP needs second derivatives, which this backbone does not have ({error}); choose another backbone "
                "or another method"
            ) from None
    return {name: (weight * row).detach() for (name, weight), row in zip(weights.items(), curved)}


def random_like(shapes: Mapping[str, torch.Size], device: torch.device) -> Scores:
    """Uniform scores, drawn on the CPU so that every device prunes the same."""
    return {name: torch.rand(shape).to(device) for name, shape in shapes.items()}


def prunable_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that unstructured pruning may remove: of convolutions and linear layers, by parameter name.

    Layers that transform their weight before they use it are left out (see `uses_weight_as_is`).

    Raises:
        UserError: if there are none.
    """
    weights = {
        f"{name}.weight" if name else "weight": layer.weight
        for name, layer in module.named_modules()
        if uses_weight_as_is(layer)
    }
    if not weights:
        network = type(getattr(module, "network", module)).__name__
        raise UserError(
            f"{network} has no weights that pruning could remove: no convolution or linear layer uses its weight as it "
            "is; choose another backbone"
        )
    return weights
