"""Writes objective_updates.json: what DomainBed's objectives do to a network in a few updates.

usage: python tests/golden/make_objective_updates.py DOMAINBED_ROOT

Weights and batches come from formulas (`formula_weights`, `formula_batches`), so that the test builds the same ones.
Values in the committed file: DomainBed at commit b93c22a1cfc3, torch 2.14.1, CPU; python's, numpy's and torch's
generators seeded with 7 before each objective's first update. In double precision: rounding in single precision differs
between processors, and Adam's first steps, which have the sign of the gradient, magnify it.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

INPUT_SHAPE, CLASSES, DOMAINS, BATCH, UPDATES, SEED = (3, 28, 28), 5, 3, 6, 5, 7
OVERRIDES = {
    "ERM": {},
    "IRM": {"irm_lambda": 5.0, "irm_penalty_anneal_iters": 2},
    "VREx": {"vrex_lambda": 5.0, "vrex_penalty_anneal_iters": 2},
    "GroupDRO": {"groupdro_eta": 0.1},
    "CORAL": {"mmd_gamma": 2.0},
    "Mixup": {"mixup_alpha": 0.4},
}


def formula_weights(algorithm):
    """Sets every parameter of featurizer and classifier by a formula over its position."""
    with torch.no_grad():
        for part in ("featurizer", "classifier"):
            for number, (_, parameter) in enumerate(sorted(getattr(algorithm, part).named_parameters())):
                index = torch.arange(parameter.numel(), dtype=torch.float64)
                wave = torch.sin(index * 0.7 + number) * torch.cos(index * 0.013)
                scale = 1.0 if parameter.dim() == 1 else (2.0 / parameter[0].numel()) ** 0.5
                parameter.copy_((wave * scale + (0.5 if parameter.dim() == 1 else 0)).reshape(parameter.shape))


def formula_batches(update):
    """One (x, y) per domain; they differ from update to update."""
    batches = []
    for domain in range(DOMAINS):
        count = BATCH * int(np.prod(INPUT_SHAPE))
        index = torch.arange(count, dtype=torch.float64)
        x = torch.sin(index * (0.37 + 0.11 * domain) + update).reshape(BATCH, *INPUT_SHAPE)
        y = (torch.arange(BATCH) * (domain + 2) + update) % CLASSES
        batches.append((x, y))
    return batches


def seed_all():
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def trace(algorithm):
    """Losses of the updates, and what the parameters are afterwards: norm and some entries of each."""
    algorithm.double()
    formula_weights(algorithm)
    seed_all()
    torch.set_default_dtype(torch.float64)  # of what an update makes itself, such as VREx's losses
    try:
        losses = [algorithm.update(formula_batches(update))["loss"] for update in range(UPDATES)]
    finally:
        torch.set_default_dtype(torch.float32)
    after = {
        f"{part}.{name}": [
            parameter.norm().item(),
            *parameter.flatten()[:: max(1, parameter.numel() // 4)][:4].tolist(),
        ]
        for part in ("featurizer", "classifier")
        for name, parameter in sorted(getattr(algorithm, part).named_parameters())
    }
    return {"losses": losses, "parameters": after}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from domainbed import algorithms, hparams_registry

    golden = {}
    for name, overrides in OVERRIDES.items():
        hparams = {**hparams_registry.default_hparams(name, "RotatedMNIST"), **overrides}
        golden[name] = trace(algorithms.get_algorithm_class(name)(INPUT_SHAPE, CLASSES, DOMAINS, hparams))
    Path(__file__).with_name("objective_updates.json").write_text(json.dumps(golden, indent=1) + "\n")
