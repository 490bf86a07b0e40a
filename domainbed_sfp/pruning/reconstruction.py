"""Remaining channels take over from removed ones: what a layer reads is reconstructed by least squares."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

# Averages of input moments forget with this factor at every update.
MOMENTUM = 0.95
# Positions of a feature map that enter the moments, along each side.
POSITIONS = 4
# Added to the diagonal, as a share of its mean: channels that hardly fire would get weights without bound.
RIDGE = 1e-3


class InputMoments(nn.Module):
    """Running second moments E[h h^T] of what layers read, by the name of the weight that reads it.

    Args:
        channels: C, the number of channels that each weight reads.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.names = list(channels)
        for name, count in channels.items():
            self.register_buffer(self._buffer(name), torch.zeros(count, count))

    @staticmethod
    def _buffer(name: str) -> str:
        return name.replace(".", "/")  # torch forbids dots in buffer names

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, self._buffer(name))

    @torch.no_grad()
    def update(self, name: str, x: Tensor) -> None:
        """Takes in what the layer of `name` reads: [N, C, H, W], on a grid of positions, or [N, C]."""
        if x.dim() == 4:
            steps = [max(1, side // POSITIONS) for side in x.shape[2:]]
            x = x[:, :, steps[0] // 2 :: steps[0], steps[1] // 2 :: steps[1]].permute(0, 2, 3, 1).flatten(0, 2)
        x = x.float()
        self[name].lerp_(x.t() @ x / len(x), 1 - MOMENTUM)


@torch.no_grad()
def reconstruct(weight: Tensor, moments: Tensor, dying: Tensor, alive: Tensor) -> None:
    """Adds to the weights that read living channels what those of dying channels did, as far as that can be said by the
    living ones; in place.

    With h what the layer reads, M minimises E||h_dying - M h_alive||^2, and W_alive <- W_alive + W_dying M: for a 1 x 1
    convolution the least-squares reconstruction of its output (He, Zhang, Sun 2017, arXiv 1707.06168, section 3.1;
    there by layers one after another, here from running moments while the network trains).

    Args:
        weight: [out, C, ...].
        moments: E[h h^T], [C, C].
        dying, alive: bool [C]. What is in neither is dead already and contributes nothing.
    """
    if not dying.any():
        return
    moments = moments.double()
    among = moments[alive][:, alive]
    among.diagonal().add_(RIDGE * among.diagonal().mean().clamp_min(1e-12))
    mixing = torch.linalg.solve(among, moments[alive][:, dying]).t().to(weight.dtype)  # [dying, alive]
    weight[:, alive] += torch.einsum("od...,da->oa...", weight[:, dying], mixing)


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
