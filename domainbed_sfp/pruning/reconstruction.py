"""Remaining channels take over from removed ones: what a layer reads is reconstructed by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp.core.hparam import Hparam, one_of
from domainbed_sfp.networks.folding import find_pairs
from domainbed_sfp.pruning.masks import Masks
from domainbed_sfp.pruning.named_tensors import attribute_name
from domainbed_sfp.pruning.structure import ChannelGroup

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
    def update(self, name: str, x: Tensor, weights: Tensor | None = None) -> None:
        """Takes in rows [M, C] of what the layer of `name` reads, sample by sample; `weights` [N] say how much each
        sample counts, alike by default."""
        x = torch.cat([x.float(), x.new_ones(len(x), 1, dtype=torch.float32)], 1)
        weighted = x
        if weights is not None:
            weighted = x * (weights / weights.mean()).repeat_interleave(len(x) // len(weights))[:, None]
        self[name].lerp_(weighted.t() @ x / len(x), 1 - MOMENTUM)


def channel_rows(x: Tensor, layer: nn.Module, channels: int) -> Tensor:
    """What `layer` reads as rows [M, channels], sample by sample: a row for each of some positions of a map [N, C, H,
    W], and for each position of what a linear layer reads, [N, ..., C], or [N, C k] behind a flattened map."""
    if isinstance(layer, nn.Conv2d):
        steps = [max(1, side // POSITIONS) for side in x.shape[2:]]
        return x[:, :, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]].permute(0, 2, 3, 1).flatten(0, 2)
    return x.flatten(0, -2).unflatten(1, (channels, -1)).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def reconstruct(weight: Tensor, moments: Tensor, dying: Tensor, alive: Tensor, constant: bool) -> Tensor:
    """Adds to the weights that read living channels what those of dying channels did, as far as that can be said by the
    living ones; in place. Returns [out], what is to be added to the layer's output besides.

    With h what the layer reads, M minimises E||h_dying - M h_alive||^2, and W_alive <- W_alive + W_dying M: for a 1 x 1
    convolution the least-squares reconstruction of its output (He, Zhang, Sun 2017, arXiv 1707.06168, section 3.1;
    there by layers one after another, here from running moments while the network trains).

    Args:
        weight: [out, C, ...], or [out, C k] behind a flattened map.
        moments: E[h h^T] with a constant, [C + 1, C + 1], as `InputMoments` has them.
        dying, alive: bool [C]. What is in neither is dead already and contributes nothing.
        constant: whether the output may be shifted; otherwise the result is 0.
    """
    if not dying.any():
        return weight.new_zeros(len(weight))
    among, told = with_ridge(moments, alive, constant), moments.double()[:-1][dying]
    told = told[:, torch.cat([alive, alive.new_full((1,), constant)])]
    mixing = torch.linalg.solve(among, told.t()).t().to(weight.dtype)  # [dying, alive and constant]
    parts = by_channel(weight, len(alive))
    lost, kept = parts[:, dying], int(alive.sum())
    parts[:, alive] += torch.einsum("odk,da->oak", lost, mixing[:, :kept])
    return torch.einsum("odk,d->o", lost, mixing[:, kept]) if constant else weight.new_zeros(len(weight))


def by_channel(weight: Tensor, channels: int) -> Tensor:
    """A view [out, channels, k] of what reads the channels: taps of a kernel, or positions of a flattened map."""
    return weight.view(len(weight), channels, -1)


def with_ridge(moments: Tensor, kept: Tensor, constant: bool) -> Tensor:
    """The rows and columns of `moments` [C + 1, C + 1] of the channels `kept`, bool [C], and of the constant where it
    is asked for, with the ridge on the channels' diagonal; float64."""
    chosen = moments.double()[:-1, :-1][kept][:, kept]
    chosen.diagonal().add_(RIDGE * chosen.diagonal().mean().clamp_min(1e-12))
    if not constant:
        return chosen
    means = moments.double()[-1, :-1][kept]
    corner = moments.double()[-1:, -1:].clamp_min(1e-12)
    return torch.cat([torch.cat([chosen, means[:, None]], 1), torch.cat([means[None], corner], 1)])


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
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup] = ()) -> None:
        super().__init__()
        self.group_of = {reader: group for group in groups for reader in group.readers}
        self.moments = InputMoments({name: group.channels for name, group in self.group_of.items()})
        self.norms = _norms_behind(network, self.moments.names)

    def watch(self, network: nn.Module, due: bool) -> ReaderInputs:
        """Collects while it lasts what the readers of `network` read; nothing unless it is `due`."""
        return ReaderInputs({name: _layer(network, name) for name in self.moments.names} if due else {})

    def take(self, seen: ReaderInputs, weights: Tensor | None = None) -> None:
        """Takes in what was collected; `weights` [N] say how much each sample counts."""
        for name, inputs in seen.inputs.items():
            rows = channel_rows(torch.cat(inputs), seen.layers[name], self.group_of[name].channels)
            self.moments.update(name, rows, weights)

    def shifts(self, network: nn.Module, name: str) -> Tensor | None:
        """What shifts the output of the reader `name`, [out]: to be added to, or for a BatchNorm subtracted from."""
        norm = self.norms.get(name)
        return network.get_buffer(f"{norm}.running_mean") if norm else _layer(network, name).bias

    @torch.no_grad()
    def take_over(self, network: nn.Module, before: Masks, alive: Mapping[str, Tensor]) -> None:
        """Changes the readers' weights for the channels that go: masks `before` and `alive` by group name."""
        for name in self.moments.names:
            group = self.group_of[name].name
            shifted = self.shifts(network, name)
            dying = before[group] & ~alive[group]
            weight = _layer(network, name).weight.data
            shift = reconstruct(weight, self.moments[name], dying, alive[group], shifted is not None)
            if shifted is not None:
                shifted.data.add_(shift, alpha=-1 if name in self.norms else 1)


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
