"""What a network costs: parameters and multiply-accumulate operations, dense and surviving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups


@dataclass(frozen=True)
class Cost:
    """parameters: of the dense network; surviving_parameters: not masked. dense_macs and macs: multiply-accumulate
    operations for one image, of the dense network and with dead weights left out (1 MAC = 2 FLOPs; convolutions and
    linear layers only, as the field counts them)."""

    parameters: int
    surviving_parameters: int
    dense_macs: int
    macs: int


def count_positions(
    network: nn.Module, input_shape: tuple[int, ...], forward: Callable[[Tensor], Tensor] | None = None
) -> dict[str, int]:
    """How often each weight of a convolution or linear layer is used for one image: output positions by
    parameter name, for an input of shape (channels, height, width). `forward` is what is called where it is not
    the network itself."""
    positions: dict[str, int] = {}
    for name, module, output in _outputs_for_one_image(network, input_shape, forward or network):
        # Linear layers write along the last dimension, whether behind tokens, rows and columns, or nothing. All others
        # count, the first too: the batch is one image, or its windows.
        used = output.numel() // output.shape[-3 if isinstance(module, nn.Conv2d) else -1]
        positions[f"{name}.weight"] = positions.get(f"{name}.weight", 0) + used
    return positions


def rows_of_an_image(network: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """How many rows of a batch one image is where a convolution or linear layer reads it, by the layer's name: 1, or
    more where images are cut into windows."""
    return {name: len(output) for name, _, output in _outputs_for_one_image(network, input_shape, network)}


@torch.no_grad()
def _outputs_for_one_image(
    network: nn.Module, input_shape: tuple[int, ...], forward: Callable[[Tensor], Tensor]
) -> list[tuple[str, nn.Module, Tensor]]:
    """What convolutions and linear layers give for one image, in evaluation mode: (name, layer, output) by call."""
    outputs: list[tuple[str, nn.Module, Tensor]] = []
    handles = []
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):

            def take(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
                outputs.append((name, module, output))

            handles.append(layer.register_forward_hook(take))
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        device = next(network.parameters()).device
        forward(torch.zeros(1, *input_shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return outputs


def measure_cost(parameters: Mapping[str, Tensor], positions: Mapping[str, int], masks: Mapping[str, Tensor]) -> Cost:
    """The cost of a network under masks.

    Args:
        parameters: all parameters, by name.
        positions: see `count_positions`; what is no parameter, as helpers of the training are not, costs nothing.
        masks: bool tensors by parameter name; a parameter without one lives whole.
    """
    positions = {name: used for name, used in positions.items() if name in parameters}
    alive = {name: int(masks[name].sum()) if name in masks else value.numel() for name, value in parameters.items()}
    return Cost(
        parameters=sum(value.numel() for value in parameters.values()),
        surviving_parameters=sum(alive.values()),
        dense_macs=sum(parameters[name].numel() * used for name, used in positions.items()),
        macs=sum(alive[name] * used for name, used in positions.items()),
    )


def sparsities(masks: Mapping[str, Tensor], groups: Iterable[ChannelGroup]) -> dict[str, float]:
    """The fraction that masks remove, in each unit it can be counted in.

    weight: of the masked parameters' elements. filter: of the first dimension of masked weights of two dimensions or
    more. channel: of the channels of `groups`; a channel is dead where its whole filter is.
    """
    counted: dict[str, tuple[int, int]] = {
        "weight": (sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values()))
    }
    rows = [mask.flatten(1).any(1) for mask in masks.values() if mask.ndim > 1]
    counted["filter"] = (sum(int(row.sum()) for row in rows), sum(len(row) for row in rows))
    groups = list(groups)
    counted["channel"] = (
        sum(_living_channels(masks, group) for group in groups),
        sum(group.channels for group in groups),
    )
    return {unit: 1 - alive / total for unit, (alive, total) in counted.items() if total}


def _living_channels(masks: Mapping[str, Tensor], group: ChannelGroup) -> int:
    filters = masks.get(group.filters[0])
    return group.channels if filters is None else int(filters.flatten(1).any(1).sum())


def sparsities_of(algorithm: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """What `masks` remove from an algorithm's network, by unit (see `sparsities`): in its own, where it
    says which, else in all that can be counted."""
    groups: list[ChannelGroup] = list(getattr(algorithm, "groups", []))
    featurizer, classifier = getattr(algorithm, "featurizer", None), getattr(algorithm, "classifier", None)
    if not groups and featurizer is not None and classifier is not None:
        with suppress(UserError):  # a network without channels that may be removed
            groups = channel_groups(featurizer, classifier, residual_streams=True)
        if not any(group.is_residual and _living_channels(masks, group) < group.channels for group in groups):
            groups = [group for group in groups if not group.is_residual]  # it leaves residual streams whole
    found = sparsities(masks, groups)
    unit = getattr(algorithm, "granularity", None)
    return {unit: found[unit]} if unit in found else found
