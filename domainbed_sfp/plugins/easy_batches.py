"""Batches that any method learns in a few steps, for the checks of the contract."""

from __future__ import annotations

import torch

from domainbed_sfp.core.seeds import seed_hash
from domainbed_sfp.data.loaders import Minibatch

INPUT_SHAPE, CLASSES, DOMAINS, BATCH = (3, 8, 8), 4, 3, 8


def minibatches(step: int) -> list[Minibatch]:
    """Easy batches: the class is the brightest quadrant."""
    batches = []
    for domain in range(DOMAINS):
        generator = torch.Generator().manual_seed(seed_hash("contract", step, domain))
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        x = 0.5 * torch.randn(BATCH, *INPUT_SHAPE, generator=generator)
        for index, label in enumerate(y.tolist()):
            row, column = 4 * (label // 2), 4 * (label % 2)
            x[index, :, row : row + 4, column : column + 4] += 1.5
        aligned = torch.randperm(BATCH, generator=generator) < 3 * BATCH // 4
        batches.append(Minibatch(x, y, aligned))
    return batches
