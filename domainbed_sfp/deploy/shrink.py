"""Takes dead channels out of a network for good.

What belongs to a channel is derived twice, independently: by this package from the network's traced graph
(`pruning.groups`), which is what masks are made from, and by torch-pruning (Fang et al. 2023, arXiv 2301.12900)
from autograd's. torch-pruning cuts, and only where both agree. Nothing else in this package uses it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.deploy.exported import ExportedNetwork, GroupNormOfSurvivors, replace_group_norm, stored_tensors
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups


@dataclass(frozen=True)
class DeadChannels:
    """The channels of a group of which a network's masks leave nothing: bool [channels], at least one is True."""

    group: ChannelGroup
    dead: Tensor

    def indices(self) -> list[int]:
        return self.dead.nonzero().flatten().tolist()


def plain_network(network: nn.Module) -> ExportedNetwork:
    """A copy of what `Algorithm.export` gives, under the parameter names of the algorithm and its masks.

    Raises UserError unless it is a sequence of a featurizer with a method `features` and a classifier.
    """
    if not _is_plain(network):
        raise UserError(
            "channels can be taken out where export() gives an nn.Sequential(featurizer, classifier), and it gives a "
            f"{type(network).__name__}"
        )
    featurizer, classifier = copy.deepcopy(network)
    return ExportedNetwork(featurizer, classifier).eval()


def find_dead_channels(network: ExportedNetwork, masks: Mapping[str, Tensor]) -> list[DeadChannels]:
    """The channels of which masks leave no weight, neither of those that make and carry them nor of those that read
    them. Masks of single weights leave none dead: biases and normalization live.

    Args:
        masks: bool tensors by parameter name, as `Algorithm.masks` gives them.

    Raises:
        UserError: for a mask of another network.
    """
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise UserError(f"the masks are of another network: it has no parameter {name!r}")
        if mask.shape != parameters[name].shape:
            raise UserError(
                f"the masks are of another network: that of {name!r} has shape {tuple(mask.shape)}, expected "
                f"{tuple(parameters[name].shape)}"
            )
    if all(bool(mask.all()) for mask in masks.values()):
        return []
    try:
        groups = channel_groups(network.featurizer, network.classifier, residual_streams=True)
    except UserError:  # no network whose channels could have been masked
        return []
    found = []
    for group in groups:
        names = (*group.filters, *group.vectors, *group.readers)
        if any(name not in masks for name in names):
            continue
        alive = torch.zeros(group.channels, dtype=torch.bool)
        for name in (*group.filters, *group.vectors):
            alive |= masks[name].cpu().flatten(1).any(1) if masks[name].dim() > 1 else masks[name].cpu()
        for name in group.readers:
            # A linear layer after a flattened feature map reads several numbers of each channel.
            alive |= masks[name].cpu().transpose(0, 1).reshape(group.channels, -1).any(1)
        if not alive.all():
            found.append(DeadChannels(group, ~alive))
    return found


def surviving_masks(masks: Mapping[str, Tensor], dead: list[DeadChannels]) -> dict[str, Tensor]:
    """The masks of what is left once the dead channels are gone: False where a weight is stored as a zero."""
    left = dict(masks)
    for entry in dead:
        keep = ~entry.dead
        for name in (*entry.group.filters, *entry.group.vectors):
            left[name] = left[name][keep.to(left[name].device)]
        for name in entry.group.readers:
            columns = keep.repeat_interleave(left[name].shape[1] // len(keep))
            left[name] = left[name][:, columns.to(left[name].device)]
    return left


def exported_bytes(network: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors in the file that `export` would write: parameters and buffers without dead channels, as
    they are stored. The file's header, some kilobytes of names and shapes, is not counted.

    Args:
        network: what `Algorithm.export` gives.
        masks: bool tensors by parameter name, as `Algorithm.masks` gives them.
    """
    if not _is_plain(network):  # nothing that could be taken out
        return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    featurizer, classifier = network
    plain = ExportedNetwork(featurizer, classifier)
    tensors = stored_tensors(plain)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    dead = find_dead_channels(plain, masks)
    for name, mask in surviving_masks(masks, dead).items():
        sizes[name] = mask.numel()
    for entry in dead:
        for name in _statistics(plain, entry.group):
            sizes[name] -= int(entry.dead.sum())
    return sum(size * tensors[name].element_size() for name, size in sizes.items())


def is_available() -> bool:
    """Whether torch-pruning is installed."""
    return importlib.util.find_spec("torch_pruning") is not None


def remove_channels(
    network: nn.Module, masks: Mapping[str, Tensor], input_shape: tuple[int, ...]
) -> tuple[ExportedNetwork, list[DeadChannels]]:
    """A copy of a masked network without its dead channels, and which those were.

    It has the logits of the masked network if the masked weights are zero and, before a GroupNorm, dead channels are
    zero too: whoever writes it to a file compares. Masks of single weights take nothing out; zeros are stored.

    Args:
        network: what `Algorithm.export` gives: nn.Sequential(featurizer, classifier).
        masks: bool tensors by parameter name, as `Algorithm.masks` gives them.
        input_shape: (channels, height, width).

    Raises:
        UserError: for masks of another network, a network that torch-pruning understands differently, or where
            channels are dead and torch-pruning is not installed.
    """
    pruned = plain_network(network)
    dead = find_dead_channels(pruned, masks)
    if not dead:
        return pruned, dead
    if not is_available():
        raise UserError("taking channels out needs torch-pruning: pip install 'domainbed_sfp[export]'")
    norms = _group_norms(pruned, dead)
    _cut(pruned, dead, input_shape)
    for name, (channels, survivors) in norms.items():
        norm: Any = pruned.get_submodule(name)
        norm.num_channels = channels  # torch-pruning cuts this too, but groups are as large as they were
        replace_group_norm(pruned, name, survivors)
    return pruned, dead


def surviving_groups(network: nn.Module) -> dict[str, list[int]]:
    """How many channels are left in each group, by the name of every GroupNorm that has lost some."""
    norms = ((name, module) for name, module in network.named_modules() if isinstance(module, GroupNormOfSurvivors))
    return {name: list(norm.survivors) for name, norm in norms}


def _is_plain(network: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(network, nn.Sequential) and len(network) == 2 and hasattr(network[0], "features")


def _group_norms(network: ExportedNetwork, dead: list[DeadChannels]) -> dict[str, tuple[int, list[int]]]:
    """How many channels every GroupNorm had that loses some, and how many will be left in each of its groups."""
    found = {}
    for entry in dead:
        for owner in _owners(entry.group.vectors):
            module = network.get_submodule(owner)
            if isinstance(module, nn.GroupNorm):
                left = (~entry.dead).view(module.num_groups, -1).sum(1)
                found[owner] = (module.num_channels, left.tolist())
    return found


def _statistics(network: ExportedNetwork, group: ChannelGroup) -> list[str]:
    """Names of the running statistics of a group's channels."""
    buffers = dict(network.named_buffers())
    names = [f"{owner}.{part}" for owner in _owners(group.vectors) for part in ("running_mean", "running_var")]
    return [name for name in names if name in buffers]


def _owners(names: tuple[str, ...]) -> list[str]:
    """The modules of parameters, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _cut(network: ExportedNetwork, dead: list[DeadChannels], input_shape: tuple[int, ...]) -> None:
    """Lets torch-pruning remove channels, in place."""
    import torch_pruning

    device = next(network.parameters()).device
    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            network.requires_grad_(True)
            graph.build_dependency(network, (torch.zeros(1, *input_shape, device=device),), verbose=False)
        names = {module: name for name, module in network.named_modules()}
        for entry in dead:
            root = network.get_submodule(_owners(entry.group.filters)[0])
            prune = (
                torch_pruning.prune_conv_out_channels
                if isinstance(root, nn.Conv2d)
                else torch_pruning.prune_linear_out_channels
            )
            cuts = graph.get_pruning_group(root, prune, entry.indices())
            _compare(entry, _cuts_of(graph, cuts, names), _expected_cuts(network, entry))
            cuts.prune(record_history=False)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"torch-pruning cannot take channels out of {type(network.featurizer).__name__} "
            f"({type(error).__name__}: {reason}); the masked network itself is unharmed"
        ) from error


# What is cut: the module, whether its outputs or its inputs, and which of them.
_Cuts = dict[tuple[str, str], list[int]]


def _cuts_of(graph: Any, cuts: Any, names: Mapping[nn.Module, str]) -> _Cuts:
    """What torch-pruning is about to cut; its operations without weights are left out."""
    found: _Cuts = {}
    for dependency, indices in cuts:
        target = dependency.target.module
        if isinstance(target, nn.Parameter):  # outside of any layer that it knows
            found[f"a parameter of shape {tuple(target.shape)}", "outputs"] = sorted(indices)
        elif target in names and any(True for _ in target.parameters()):
            side = "outputs" if graph.is_out_channel_pruning_fn(dependency.handler) else "inputs"
            found[names[target], side] = sorted(indices)
    return found


def _expected_cuts(network: ExportedNetwork, entry: DeadChannels) -> _Cuts:
    indices = entry.indices()
    expected: _Cuts = {(owner, "outputs"): indices for owner in _owners((*entry.group.filters, *entry.group.vectors))}
    for name in entry.group.readers:
        each = network.get_parameter(name).shape[1] // entry.group.channels
        columns = [index * each + offset for index in indices for offset in range(each)]
        expected[name.rpartition(".")[0], "inputs"] = columns
    return expected


def _compare(entry: DeadChannels, found: _Cuts, expected: _Cuts) -> None:
    for cut in {**expected, **found}:
        if found.get(cut) != expected.get(cut):
            name, side = cut
            raise UserError(
                f"torch-pruning and the masks disagree about what belongs to the channels of {entry.group.name!r}: "
                f"{len(found.get(cut, []))} {side} of {name} against {len(expected.get(cut, []))}; nothing is cut"
            )
