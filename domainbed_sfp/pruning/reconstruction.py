"""Remaining channels take over from removed ones: what a layer reads is reconstructed by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp.core.hparam import Hparam, one_of
from domainbed_sfp.networks.folding import find_pairs
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.state import Masks, attribute_name

RECONSTRUCTION = Hparam(
    "none",
    doc="channel: what becomes of removed channels: the remaining ones take over what can be said by them "
    "(least_squares), or nothing does (none)",
    valid=one_of("least_squares", "none"),
    earlier="none",
)

# Averages of input moments forget with this factor at every update.
MOMENTUM = 0.95
# Positions of a feature map that enter the moments, along each side.
POSITIONS = 4
# Added to the diagonal, as a share of its mean: channels that hardly fire would get weights without bound.
RIDGE = 1e-3


class InputMoments(nn.Module):
    """Running second moments E[h h^T] of what layers read and of a constant 1 behind it, by the name of the weight that
    reads it: the last row is E[h].

    Args:
        channels: C, the number of channels that each weight reads; moments are [C + 1, C + 1].
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.names = list(channels)
        for name, count in channels.items():
            self.register_buffer(attribute_name(name), torch.zeros(count + 1, count + 1))

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, attribute_name(name))

    @torch.no_grad()
    def update(self, name: str, x: Tensor, weights: Tensor | None = None, other: Tensor | None = None) -> None:
        """Takes in rows [M, C] of what the layer of `name` reads, sample by sample; `weights` [N] say how much each
        sample counts, alike by default. With rows of an `other` network moments are E[g h^T], g of the other."""
        x = _with_constant(x)
        left = x if other is None else _with_constant(other)
        if weights is not None:
            left = left * (weights / weights.mean()).repeat_interleave(len(x) // len(weights))[:, None]
        self[name].lerp_(left.t() @ x / len(x), 1 - MOMENTUM)


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x.float(), x.new_ones(len(x), 1, dtype=torch.float32)], 1)


def channel_rows(x: Tensor, layer: nn.Module, channels: int) -> Tensor:
    """What `layer` reads as rows [M, channels], sample by sample: a row for each of some positions of a map [N, C, H,
    W], and for each position of what a linear layer reads, [N, ..., C], or [N, C k] behind a flattened map."""
    if isinstance(layer, nn.Conv2d):
        steps = [max(1, side // POSITIONS) for side in x.shape[2:]]
        return x[:, :, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]].permute(0, 2, 3, 1).flatten(0, 2)
    return x.flatten(0, -2).unflatten(1, (channels, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Told:
    """A layer whose output is wanted: its weight, what is added to its output [out] (or None), and what it read.

    cross: E[g h^T] of what it read, g, and what the layer to be changed reads, h, each with a constant: [C + 1, C + 1].
    """

    weight: Tensor
    shift: Tensor | None
    cross: Tensor


@torch.no_grad()
def reconstruct(
    weight: Tensor, shift: Tensor | None, moments: Tensor, alive: Tensor, told: Told | None = None
) -> Tensor | None:
    """Sets the weights that read living channels such that what the layer makes of them is, by least squares, what it
    makes of all channels, or what `told` makes of what it read; in place. Returns the new shift of its output.

    Minimises E||W g + b - W' h_alive - b'||^2, with a ridge that draws W' to the weights as they are. For a 1 x 1
    convolution that is the reconstruction of He, Zhang, Sun 2017 (arXiv 1707.06168), section 3.1: with `told` their
    equation (the outputs wanted are the unpruned network's, the inputs the pruned one's), here from running moments
    while the network trains.

    Args:
        weight: [out, C, ...], or [out, C k] behind a flattened map. What reads dead channels has no say.
        shift: [out], what is added to the output; None where nothing can be.
        moments: E[h h^T] with a constant, [C + 1, C + 1], as `InputMoments` has them.
        alive: bool [C].
    """
    told = told or Told(weight, shift, moments)
    constant, kept = shift is not None, int(alive.sum())
    among, ridge = with_ridge(moments, alive, constant), ridge_of(moments, alive)
    columns = torch.cat([alive, alive.new_full((1,), constant)])
    parts, wanted = by_channel(weight, len(alive)), by_channel(told.weight, len(alive))
    inverse = torch.linalg.inv(among)
    mixing = (told.cross.double()[:-1, columns] @ inverse).to(weight.dtype)  # [C, alive and constant]
    pull = (ridge * inverse[:kept]).to(weight.dtype)  # [alive, alive and constant]
    fitted = torch.einsum("ock,ca->oak", wanted, mixing) + torch.einsum("odk,da->oak", parts[:, alive], pull)
    parts[:, alive] = fitted[:, :kept]
    if shift is None:
        return None
    return fitted[:, kept].sum(1) + (shift if told.shift is None else told.shift)


def by_channel(weight: Tensor, channels: int) -> Tensor:
    """A view [out, channels, k] of what reads the channels: taps of a kernel, or positions of a flattened map."""
    return weight.view(len(weight), channels, -1)


def with_ridge(moments: Tensor, kept: Tensor, constant: bool) -> Tensor:
    """The rows and columns of `moments` [C + 1, C + 1] of the channels `kept`, bool [C], and of the constant where it
    is asked for, with the ridge on the channels' diagonal; float64."""
    columns = torch.cat([kept, kept.new_full((1,), constant)])
    chosen = moments.double()[columns][:, columns]
    diagonal = chosen.diagonal()
    diagonal[: int(kept.sum())] += ridge_of(moments, kept)
    diagonal.clamp_(min=1e-12)
    return chosen


def ridge_of(moments: Tensor, kept: Tensor) -> Tensor:
    """What is added to the diagonal of the moments of the channels `kept`."""
    return RIDGE * moments.diagonal()[:-1][kept].double().mean().clamp_min(1e-9)


class ReaderInputs(AbstractContextManager["ReaderInputs"]):
    """Collects, while it lasts, what the layers of the given weights read, without gradients."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.handles: list[Any] = []

    def __enter__(self) -> ReaderInputs:
        for name, layer in self.layers.items():
            self.handles.append(
                layer.register_forward_pre_hook(lambda _, x, seen=self.inputs[name]: seen.append(x[0].detach()))
            )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


class Reconstruction(nn.Module):
    """Follows what the readers of channel groups read, and reconstructs it when channels go.

    An output is shifted by the layer's bias, or by the mean that a BatchNorm behind it subtracts.

    Args:
        network: holds the readers by the names that the groups have for them.
        groups: whose readers are followed; of none by default, at no cost.
        follows: whether readers are to make what those of another network make, instead of what they made themselves.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup] = (), follows: bool = False) -> None:
        super().__init__()
        self.group_of = {reader: group for group in groups for reader in group.readers}
        channels = {name: group.channels for name, group in self.group_of.items()}
        self.moments = InputMoments(channels)
        # E[g h^T], with what the other network's readers read, g.
        self.cross = InputMoments(channels if follows else {})
        self.norms = _norms_behind(network, self.moments.names)

    def watch(self, network: nn.Module, due: bool) -> ReaderInputs:
        """Collects while it lasts what the readers of `network` read; nothing unless it is `due`."""
        return ReaderInputs({name: _layer(network, name) for name in self.moments.names} if due else {})

    def take(self, seen: ReaderInputs, weights: Tensor | None = None, told: ReaderInputs | None = None) -> None:
        """Takes in what was collected, of the network and, of the same samples, of the one that is followed; `weights`
        [N] say how much each sample counts."""
        for name in seen.inputs:
            rows = self._rows(seen, name)
            self.moments.update(name, rows, weights)
            if told is not None:
                self.cross.update(name, rows, weights, self._rows(told, name))

    def forget(self) -> None:
        """Begins anew: what is followed was another network before."""
        for buffer in self.buffers():
            buffer.zero_()

    def shifts(self, network: nn.Module, name: str) -> Tensor | None:
        """What shifts the output of the reader `name`, [out]; None where nothing does."""
        norm = self.norms.get(name)
        return -network.get_buffer(f"{norm}.running_mean") if norm else _layer(network, name).bias

    @torch.no_grad()
    def take_over(
        self, network: nn.Module, before: Masks, alive: Mapping[str, Tensor], followed: nn.Module | None = None
    ) -> None:
        """Changes the weights of those readers that lose channels: masks `before` and `alive` by group name.

        Of a network that follows another, layer after layer is to lose its channels, each when what it reads of the
        earlier ones is known: what all layers make good at once, each for the faults of all before it, adds up.
        """
        for name in self.moments.names:
            group = self.group_of[name].name
            if not (before[group] & ~alive[group]).any():
                continue
            told = None
            if followed is not None:
                told = Told(_layer(followed, name).weight, self.shifts(followed, name), self.cross[name])
            weight = _layer(network, name).weight.data
            shift = reconstruct(weight, self.shifts(network, name), self.moments[name], alive[group], told)
            if shift is not None:
                self._set_shift(network, name, shift)

    def _set_shift(self, network: nn.Module, name: str, shift: Tensor) -> None:
        if norm := self.norms.get(name):
            network.get_buffer(f"{norm}.running_mean").copy_(-shift)
        else:
            _layer(network, name).bias.data.copy_(shift)

    def _rows(self, seen: ReaderInputs, name: str) -> Tensor:
        return channel_rows(torch.cat(seen.inputs[name]), seen.layers[name], self.group_of[name].channels)


def _layer(network: nn.Module, reader: str) -> Any:
    return network.get_submodule(reader.removesuffix(".weight"))


def _norms_behind(network: nn.Module, readers: Sequence[str]) -> dict[str, str]:
    """The BatchNorm behind each reader without a bias, by the reader's name; where there is none, or another layer
    reads its output too, the reader is left out."""
    without = {id(_layer(network, name)): name for name in readers if _layer(network, name).bias is None}
    if not without:
        return {}
    names = {id(module): name for name, module in network.named_modules()}
    featurizer: Any = network.get_submodule("featurizer")
    pairs = find_pairs(getattr(featurizer, "network", featurizer))
    return {
        without[id(convolution)]: names[id(norm)]
        for convolution, norm in pairs
        if id(convolution) in without and norm.running_mean is not None
    }
