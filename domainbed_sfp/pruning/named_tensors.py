"""Tensors by parameter name that travel with a state dict: running averages and stored weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def attribute_name(name: str) -> str:
    """What a module, parameter or buffer that goes with parameter `name` is called: torch forbids dots there."""
    return name.replace(".", "/")


class NamedTensors(nn.Module):
    """Copies of tensors by name, kept as buffers: they follow the device, checkpoints and deepcopy.

    Args:
        tensors: the initial values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(tensors)
        for name, value in tensors.items():
            self.register_buffer(attribute_name(name), value.detach().clone())

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, attribute_name(name))

    def as_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {name: self[name] for name in self.names}

    @torch.no_grad()
    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Stores the values of `tensors`, which has every name."""
        for name in self.names:
            self[name].copy_(tensors[name])
