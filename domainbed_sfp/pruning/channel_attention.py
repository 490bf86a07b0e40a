"""Squeeze-and-excitation gates behind the convolutions of a network, and what becomes of them when channels go.

A gate is part of the network it stands in: a channel that goes takes its column of the gate's first layer (which reads
it) and its row of the second (which writes its attention) with it, and the accounting counts what is left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.errors import UserError
from domainbed_sfp.pruning.structure import ChannelGroup, layers_in_order, uses_weight_as_is

# Narrow layers get a gate of at least this many hidden units.
MIN_HIDDEN = 8

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_CARRIERS = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)


class ChannelGate(nn.Module):
    """A squeeze-and-excitation gate (Hu et al. 2018): x [N, C, H, W] -> a * x, a = 2 sigmoid(u) in (0, 2).

    u = expand(relu(reduce(x averaged over space))). The second layer begins at zero, so that a = 1: a network into
    which gates are put gives the logits it gave before, to the bit.

    Args:
        channels: C.
        reduction: the hidden layer has C / reduction units, but at least MIN_HIDDEN.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(MIN_HIDDEN, channels // reduction)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.expand(F.relu(self.reduce(x.mean((2, 3)))))
        return x * (2 * torch.sigmoid(logits)).unsqueeze(2).unsqueeze(3)


def inside_blocks(featurizer: nn.Module, groups: Iterable[ChannelGroup]) -> list[ChannelGroup]:
    """The groups whose channels are produced, carried and read inside one block of the network: not a stem's, nor those
    that the classifier reads. All groups where there are no blocks, as in MNIST_CNN.

    A block is a module that has all these layers in it, neither the body itself nor a mere list of other modules.
    """
    groups = list(groups)
    body = 1 if hasattr(featurizer, "network") else 0  # the path of the body: `network`, or nothing

    def is_inside(group: ChannelGroup) -> bool:
        names = (*group.filters, *group.readers)
        if not all(name.startswith("featurizer.") for name in names):
            return False
        paths = [_owner(name).split(".")[:-1] for name in names]
        common = 0
        while all(len(path) > common and path[common] == paths[0][common] for path in paths):
            common += 1
        while common > body and type(featurizer.get_submodule(".".join(paths[0][:common]))) in _LISTS:
            common -= 1
        return common > body

    return [group for group in groups if is_inside(group)] or groups


def insert_gates(
    featurizer: nn.Module, groups: Iterable[ChannelGroup], reduction: int
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Puts a gate behind the last layer that carries the channels of each group: the normalization behind the
    convolution, or behind the depthwise one where there is one; the convolution itself where there is no normalization.

    That layer L becomes a sequence of `layer` (L) and `gate`. In place.

    Args:
        featurizer: the network body in which `groups` were found.
        groups: as `channel_groups` finds them; those that are no channels of convolutions get no gate.
        reduction: see `ChannelGate`.

    Returns:
        The groups with gates, under their parameters' new names and with the gates' own weights among them, and the
        gates by group name, as paths of modules that begin with `featurizer.`.

    Raises:
        UserError: where no group is of a convolution.
    """
    order = {name: index for index, name in enumerate(layers_in_order(featurizer))}
    places: dict[str, str] = {}
    gated = [group for group in groups if _is_of_convolutions(featurizer, group)]
    for group in gated:
        owners = {_owner(name) for name in (*group.filters, *group.vectors)}
        carriers = [name for name in owners if isinstance(featurizer.get_submodule(name), _CARRIERS)]
        places[group.name] = max(carriers, key=order.__getitem__)
    if not gated:
        network = type(getattr(featurizer, "network", featurizer)).__name__
        raise UserError(
            f"channel attention stands behind the convolutions inside blocks, and {network} has none whose channels "
            "could be removed; choose another backbone"
        )
    for group in gated:
        place = places[group.name]
        parent, _, attribute = place.rpartition(".")
        layer = featurizer.get_submodule(place)
        gate = ChannelGate(group.channels, reduction)
        pair = nn.Sequential(OrderedDict(layer=layer, gate=gate))
        setattr(featurizer.get_submodule(parent), attribute, pair)

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        moved = set(places.values())
        return tuple(
            f"featurizer.{_owner(name)}.layer.{name.rpartition('.')[2]}"
            if name.startswith("featurizer.") and _owner(name) in moved
            else name
            for name in names
        )

    gates = {name: f"featurizer.{place}.gate" for name, place in places.items()}
    result = []
    for group in gated:
        gate_name = gates[group.name]
        result.append(
            replace(
                group,
                filters=(*renamed(group.filters), f"{gate_name}.expand.weight"),
                vectors=(*renamed(group.vectors), f"{gate_name}.expand.bias"),
                readers=(*renamed(group.readers), f"{gate_name}.reduce.weight"),
            )
        )
    return result, gates


def _owner(parameter: str) -> str:
    """The path, inside the featurizer, of the module that has a parameter."""
    return parameter.removeprefix("featurizer.").rpartition(".")[0]


def _is_of_convolutions(featurizer: nn.Module, group: ChannelGroup) -> bool:
    return all(isinstance(featurizer.get_submodule(_owner(name)), nn.Conv2d) for name in group.filters)


@contextmanager
def gate_logits(gates: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, the dict it gives collects the logits u [N, C] of `gates`, by name, float32, with gradients.

    A network that is called several times adds to the rows, in the order of the calls.
    """
    logits: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            latest = output.float()
            logits[name] = torch.cat([logits[name], latest]) if name in logits else latest

        return hook

    handles = [gate.get_submodule("expand").register_forward_hook(note(name)) for name, gate in gates.items()]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fold_constant_gates(network: nn.Module) -> int:
    """Takes the gates out of `network` whose attention does not depend on the input, in place; returns how many.

    Attention is constant where the gate's second layer has no weight but zeros: then 2 sigmoid(bias) is multiplied into
    the scale and shift, or weight and bias, of the layer in front, and an identity takes the gate's place. That is
    so before a gate is trained; a trained one depends on the input and stays. A layer that applies an activation of its
    own behind them, as timm's do, keeps its gate.
    """
    folded = 0
    for pair in list(network.modules()):
        gate = getattr(pair, "gate", None)
        if not isinstance(pair, nn.Sequential) or not isinstance(gate, ChannelGate) or gate.expand.weight.any():
            continue
        layer: Any = pair.get_submodule("layer")
        if type(layer) not in (nn.BatchNorm2d, nn.GroupNorm) and not uses_weight_as_is(layer):
            continue
        attention = 2 * torch.sigmoid(gate.expand.bias)
        layer.weight.mul_(attention.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(attention)
        pair.add_module("gate", nn.Identity())
        folded += 1
    return folded


@torch.no_grad()
def cut_channels(network: nn.Sequential, groups: Iterable[ChannelGroup], alive: Mapping[str, Tensor]) -> None:
    """Takes dead channels out of `network` physically, in place: filters, normalization, what reads them, and of their
    gates the column of the first layer and the row of the second.

    Args:
        network: featurizer and classifier, as `export` gives them, with zero weights where `alive` is False.
        groups: with the names the parameters have in it, the first part's beginning with `featurizer.` and the
            second's with `classifier.`; a gate that was folded away may be missing.
        alive: bool [C] by group name.

    Raises:
        UserError: where GroupNorm stands behind channels that go: it counts dead channels in the statistics of
            their group, so that the network without them would have other logits.
    """
    parts = {"featurizer": network[0], "classifier": network[1]}
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for group in groups:
        keep = alive[group.name].nonzero().flatten()
        rows.update(dict.fromkeys((*group.filters, *group.vectors), keep))
        for name in group.readers:
            columns[name] = keep
            layer = _layer(parts, name)
            if layer is not None and layer.weight.shape[1] != group.channels:
                # A linear layer after a flattened feature map reads several numbers of each channel.
                each = layer.weight.shape[1] // group.channels
                columns[name] = (keep[:, None] * each + torch.arange(each, device=keep.device)).flatten()
    for name in dict.fromkeys([*rows, *columns]):
        layer, attribute = _layer(parts, name), name.rpartition(".")[2]
        if layer is None:
            continue
        parameter = getattr(layer, attribute)
        value = parameter.data
        if name in rows and len(rows[name]) < len(value):
            if isinstance(layer, nn.GroupNorm):
                raise UserError(
                    f"{_owner(name)} is a GroupNorm, whose statistics count dead channels: without them the network "
                    "would have other logits; choose a backbone with BatchNorm"
                )
            value = value[rows[name]]
        if name in columns:
            value = value[:, columns[name]]
        setattr(layer, attribute, nn.Parameter(value.clone(), requires_grad=parameter.requires_grad))
        if attribute == "weight":
            _resize(layer, rows.get(name))


def _layer(parts: Mapping[str, nn.Module], parameter: str) -> Any:
    part, _, path = parameter.rpartition(".")[0].partition(".")
    try:
        return parts[part].get_submodule(path)
    except AttributeError:  # a gate that was folded away
        return None


def _resize(layer: Any, keep: Tensor | None) -> None:
    """Makes a layer's facts agree with its new weight, and cuts the running statistics of a BatchNorm."""
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = len(layer.weight)
        if layer.groups > 1:  # depthwise: the only grouped convolutions that are in a group of channels
            layer.in_channels = layer.groups = layer.out_channels
        else:
            layer.in_channels = layer.weight.shape[1]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = len(layer.weight)
        if keep is not None and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean, layer.running_var = layer.running_mean[keep], layer.running_var[keep]
