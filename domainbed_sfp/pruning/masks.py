"""Masks: which weights live. A mask checks itself: right shape, binary, no layer wiped out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.named_tensors import attribute_name
from domainbed_sfp.pruning.structure import ChannelGroup


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
            raise UserError(f"mask {name!r} is of another network: it has no such parameter")
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


def keep_highest(
    scores: Mapping[str, Tensor], sparsity: float, scope: str = "layer", spare_best: bool = False
) -> dict[str, Tensor]:
    """Bool tensors, shaped as the scores, with the lowest `sparsity` fraction of units False.

    scope "layer" removes the same fraction of every entry, "global" compares all entries with one another.
    With `spare_best` the best unit of every entry stays and others go in its place. Ties are broken by position, so
    that the outcome is the same everywhere. Raises UserError if nothing of an entry would be left, or for an unknown
    scope.
    """
    if spare_best:
        scores = {name: _with_best_at_the_top(score) for name, score in scores.items()}
    if scope == "layer":
        kept = {name: _keep(score.flatten(), sparsity).view(score.shape) for name, score in scores.items()}
    elif scope == "global":
        flat = _keep(torch.cat([score.flatten() for score in scores.values()]), sparsity)
        parts = flat.split([score.numel() for score in scores.values()])
        kept = {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts)}
    else:
        raise UserError(f"hparam 'pruning_scope': expected 'layer' or 'global', got {scope!r}")
    for name, keep in kept.items():
        if not keep.any():
            raise UserError(
                f"pruning {sparsity:.0%} would wipe out layer {name!r} ({keep.numel()} units); "
                "lower the sparsity or choose pruning_scope 'layer'"
            )
    return kept


def _with_best_at_the_top(scores: Tensor) -> Tensor:
    raised = scores.flatten().clone()
    raised[raised.argmax()] = torch.inf
    return raised.view(scores.shape)


def removed_units(units: int, sparsity: float) -> int:
    """How many of `units` the fraction `sparsity` takes out. Below 1 a unit stays where rounding would leave none."""
    removed = round(sparsity * units)
    return min(removed, units - 1) if sparsity < 1 else removed


def _keep(scores: Tensor, sparsity: float) -> Tensor:
    removed = removed_units(scores.numel(), sparsity)
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    if removed:
        keep[scores.argsort(stable=True)[:removed]] = False
    return keep


def lower_channels(
    groups: Iterable[ChannelGroup], alive: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], device: torch.device
) -> dict[str, Tensor]:
    """Parameter masks that take out dead channels: their filters, biases and normalization, and the weights
    with which later layers read them.

    `alive` holds a bool tensor [channels] by group name; the result has a mask for every parameter touched.
    """
    masks: dict[str, Tensor] = {}

    def mask_of(name: str) -> Tensor:
        return masks.setdefault(name, torch.ones(shapes[name], dtype=torch.bool, device=device))

    for group in groups:
        dead = ~alive[group.name].to(device)
        for name in (*group.filters, *group.vectors):
            mask_of(name)[dead] = False
        for name in group.readers:
            mask = mask_of(name)
            # A linear layer after a flattened feature map reads several numbers of each channel.
            columns = dead.repeat_interleave(mask.shape[1] // len(dead))
            mask[:, columns] = False
    return masks
