"""Spurious attributes: which value each sample has, and whether that agrees with its label."""

from __future__ import annotations

import torch
from torch import Tensor


def bernoulli(p: float, size: int, generator: torch.Generator) -> Tensor:
    """Ones with probability p, as DomainBed draws them: float [size]."""
    return (torch.rand(size, generator=generator) < p).float()


def draw_attribute(labels: Tensor, agreement: float, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An attribute with a value for each class: a sample has its label's with probability `agreement`, else one of the
    others, all as likely. At 1 / classes attribute and label are independent.

    Returns:
        attribute: int64 [N], in 0 .. classes - 1. aligned: bool [N], where it is the label's.
    """
    aligned = bernoulli(agreement, len(labels), generator).bool()
    shift = torch.randint(1, classes, (len(labels),), generator=generator)
    return torch.where(aligned, labels, (labels + shift) % classes), aligned
