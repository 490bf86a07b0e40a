"""Which units stay, by their scores, and what that says of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.pruning.groups import ChannelGroup


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
