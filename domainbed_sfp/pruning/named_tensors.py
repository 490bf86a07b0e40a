"""Tensors by parameter name that travel with a state dict: running averages and stored weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NamedTensors(nn.Module):
    """Copies of tensors by name, kept as buffers: they follow the device, checkpoints and deepcopy.

    Args:
        tensors: the initial values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(tensors)
        for name, value in tensors.items():
            self.register_buffer(self._buffer(name), value.detach().clone())

    @staticmethod
    def _buffer(name: str) -> str:
        return name.replace(".", "/")  # torch forbids dots in buffer names

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, self._buffer(name))

    def as_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {name: self[name] for name in self.names}

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Stores the values of `tensors`, which has every name."""
        for name in self.names:
            self[name].copy_(tensors[name])
