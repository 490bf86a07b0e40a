"""Short runs on random batches."""

from __future__ import annotations

import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.training import hparams

STEPS = 20


MODULAR = ["MRM", "ModIRM", "ModREx", "ModGroupDRO"]


def make(name: str, steps: int = STEPS, **overrides):
    values = hparams.resolve_hparams(name, "ColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).make((2, 8, 8), 2, 2, values)
    algorithm.total_steps = steps
    return algorithm


def batch(step: int, size: int = 8, shape=(2, 8, 8), classes: int = 2):
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(0, classes, (size,), generator=generator))
        for _ in range(2)
    ]


def train(algorithm, until: int):
    while algorithm.step < until:
        torch.manual_seed(algorithm.step)
        algorithm.update(batch(algorithm.step))
    return algorithm


def weights_of(algorithm) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in algorithm.deployed_parameters().items()}
