"""Channel attention: where in a network gates stand, and what they say.

A gate is part of the network it stands in: a channel that goes takes its column of the gate's first layer (which reads
it) and its row of the second (which writes its attention) with it, and the accounting counts what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.channel_gates import CARRIERS, put_gate
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups, layers_in_order

# Narrow layers get a gate of at least this many hidden units.
MIN_HIDDEN = 8

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


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
    featurizer: nn.Module, classifier: nn.Module, groups: Iterable[ChannelGroup], reduction: int
) -> list[ChannelGroup]:
    """Puts a gate behind the last layer that carries the channels of each group: the normalization behind the
    convolution, or behind the depthwise one where there is one; the convolution itself where there is no normalization.
    In place, see `put_gate`.

    Args:
        featurizer, classifier: the network in which `groups` were found.
        groups: as `channel_groups` finds them; those that are no channels of convolutions get no gate.
        reduction: a gate of C channels has C / reduction hidden units, but at least MIN_HIDDEN.

    Returns:
        The groups that have gates, as `channel_groups` finds them now: with the gates' own weights.

    Raises:
        UserError: where no group is of a convolution.
    """
    order = {name: index for index, name in enumerate(layers_in_order(featurizer))}
    places = {}
    for group in groups:
        if _is_of_convolutions(featurizer, group):
            owners = {_owner(name) for name in (*group.filters, *group.vectors)}
            carriers = [name for name in owners if isinstance(featurizer.get_submodule(name), CARRIERS)]
            places[max(carriers, key=order.__getitem__)] = group.channels
    if not places:
        network = type(getattr(featurizer, "network", featurizer)).__name__
        raise UserError(
            f"channel attention stands behind the convolutions inside blocks, and {network} has none whose channels "
            "could be removed; choose another backbone"
        )
    for place, channels in places.items():
        put_gate(featurizer, place, max(MIN_HIDDEN, channels // reduction))
    return [group for group in channel_groups(featurizer, classifier) if gate_of(group)]


def gate_of(group: ChannelGroup) -> str:
    """The path of a group's gate, such as `featurizer.bn1.gate`; empty where it has none."""
    suffix = ".gate.expand.weight"
    return next((name.removesuffix(".expand.weight") for name in group.filters if name.endswith(suffix)), "")


def _owner(parameter: str) -> str:
    """The path, inside the featurizer, of the module that has a parameter."""
    return parameter.removeprefix("featurizer.").rpartition(".")[0]


def _is_of_convolutions(featurizer: nn.Module, group: ChannelGroup) -> bool:
    return all(isinstance(featurizer.get_submodule(_owner(name)), nn.Conv2d) for name in group.filters)


@contextmanager
def gate_logits(gates: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, the dict it gives collects the logits u [N, C] of `gates`, by name, float32, with gradients.

    A network that is called several times adds to the rows, in the order of the calls. Of a single call they are part
    of the network's own computation: its outputs have gradients with respect to them.
    """
    logits: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            latest = output.float()
            logits[name] = torch.cat([logits[name], latest]) if name in logits else latest
            return latest.to(output.dtype)

        return hook

    handles = [gate.get_submodule("expand").register_forward_hook(note(name)) for name, gate in gates.items()]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()
