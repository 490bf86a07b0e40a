"""Featurizers without weights from elsewhere."""

from __future__ import annotations

import torch

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.training import hparams


def _featurizer(backbone: str) -> networks.Featurizer:
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": backbone, "weights": "none"})
    torch.manual_seed(0)
    return networks.make_featurizer((3, 32, 32), values)


def _train(name: str, steps: int, **overrides):
    values = hparams.resolve_hparams(name, "ColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).cls((2, 8, 8), 2, 2, values)
    algorithm.total_steps = steps
    history = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = [(torch.randn(8, 2, 8, 8), torch.randint(0, 2, (8,))) for _ in range(2)]
        algorithm.update(batch)
        history.append((algorithm.sparsity(), algorithm.masks(), algorithm.at_final_compression()))
    return algorithm, history
