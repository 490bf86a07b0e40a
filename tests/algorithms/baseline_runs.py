"""Baselines on random batches, and a tiny network."""

from __future__ import annotations

import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.training import hparams

STEPS = 20


def _make(name: str, total_steps: int = STEPS, **overrides):
    values = hparams.resolve_hparams(name, "ColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).cls((2, 8, 8), 2, 2, values)
    algorithm.total_steps = total_steps
    return algorithm


def _batch(step: int, n: int = 8):
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(n, 2, 8, 8, generator=generator), torch.randint(0, 2, (n,), generator=generator)) for _ in range(2)
    ]


def _update(algorithm, step: int):
    torch.manual_seed(step)
    return algorithm.update(_batch(step))


def _tiny_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
