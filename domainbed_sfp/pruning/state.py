"""What a pruning method remembers by parameter name: masks, gates, averages. All travel with a state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from domainbed_sfp.core.errors import UserError, did_you_mean


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


class Masks(nn.Module):
    """Bool masks by parameter name, kept as buffers so that they travel with a state dict.

    Args:
        shapes: the shape of every parameter that may be masked.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.names = list(shapes)
        for name, shape in shapes.items():
            self.register_buffer(attribute_name(name), torch.ones(shape, dtype=torch.bool))

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, attribute_name(name))

    def set(self, name: str, mask: Tensor) -> None:
        """Replaces one mask. Raises UserError for an unknown name, another shape, or a layer wiped out;
        TypeError for a mask that is not bool."""
        if name not in self.names:
            near = did_you_mean(name, self.names)
            raise UserError(f"mask {name!r} is of another network: it has no such parameter{near}")
        current = self[name]
        if mask.dtype != torch.bool:
            raise TypeError(f"mask of {name!r}: expected bool, got {mask.dtype}")
        if mask.shape != current.shape:
            raise UserError(
                f"mask {name!r} is of another network: shape {tuple(mask.shape)}, expected {tuple(current.shape)}"
            )
        if not mask.any():
            raise UserError(f"pruning would wipe out {name!r}: none of its {mask.numel()} weights is left")
        current.copy_(mask)

    def as_dict(self) -> dict[str, Tensor]:
        """Copies of all masks by parameter name."""
        return {name: self[name].clone() for name in self.names}

    @torch.no_grad()
    def zero_dead(self, parameters: Mapping[str, Tensor]) -> None:
        """Zeroes the dead weights of `parameters`, in place."""
        torch._foreach_mul_([parameters[name] for name in self.names], [self[name] for name in self.names])


class Gates(nn.Module):
    """Trainable numbers by unit name.

    Args:
        shapes: the shape of the numbers of every name.
        value: the value all begin with.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], value: float) -> None:
        super().__init__()
        self.names = list(shapes)
        for name, shape in shapes.items():
            self.register_parameter(attribute_name(name), nn.Parameter(torch.full(shape, value)))

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, attribute_name(name))

    def as_dict(self) -> dict[str, Tensor]:
        """The parameters themselves, by unit name."""
        return {name: self[name] for name in self.names}
