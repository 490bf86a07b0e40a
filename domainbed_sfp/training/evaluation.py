"""Accuracies of a network on every split, and on degraded images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.core.seeds import seed_hash
from domainbed_sfp.data.base import EVALUATION_BATCH, Dataset
from domainbed_sfp.data.images import degradations
from domainbed_sfp.data.images.augmentation import normalize
from domainbed_sfp.data.splits import Split

# Images of a test environment that are evaluated in every degradation and severity.
DEGRADED_SAMPLES = 100


@torch.no_grad()
def evaluate(algorithm: Algorithm, dataset: Dataset, splits: list[Split], device: torch.device) -> dict[str, float]:
    """Accuracies of every split, as fractions under DomainBed's names (`env0_in_acc`, ...), and what the algorithm
    measures of an environment's samples (`env0_mean_bits`, ...).

    Held-out splits are evaluated on the plain images. DomainBed augments the held-out splits of training
    environments as well, so its `env*_out_acc` of those are a little lower and noisy.
    """
    algorithm.eval()
    algorithm.measurements()  # of what was predicted before, as for counting its operations, nothing belongs here
    accuracies = {}
    for env_i, split in enumerate(splits):
        batches = dataset.evaluation_batches(env_i, device)
        correct = torch.cat([_is_correct(_predict(algorithm, x), y).cpu() for x, y in batches]).numpy()
        for name, part in (("in", split.in_), ("out", split.out), ("uda", split.uda)):
            if len(part):
                accuracies[f"env{env_i}_{name}_acc"] = float(correct[part].sum() / len(part))
        accuracies.update({f"env{env_i}_{name}": value for name, value in algorithm.measurements().items()})
    algorithm.train()
    return accuracies


def _predict(algorithm: Algorithm, x: torch.Tensor) -> torch.Tensor:
    """Logits of a batch of an evaluation. On a GPU a smaller one is filled up, unless the algorithm measures what it
    sees: cuDNN plans each convolution anew for every batch size."""
    missing = EVALUATION_BATCH - len(x)
    if x.device.type != "cuda" or missing <= 0 or type(algorithm).measurements is not Algorithm.measurements:
        return algorithm.predict(x)
    return algorithm.predict(torch.cat((x, x.new_zeros(missing, *x.shape[1:]))))[: len(x)]


@torch.no_grad()
def evaluate_degraded(
    algorithm: Algorithm, dataset: Dataset, env_i: int, device: torch.device, samples: int = DEGRADED_SAMPLES
) -> list[dict[str, Any]]:
    """How the model does on the same `samples` images of an environment, drawn evenly from all of it, as they
    are and degraded in every way and severity: for each `degradation`, `severity` (0: as they are), `samples`,
    `accuracy` (a fraction), and what the algorithm measures. A description of the finished model: nothing is chosen by
    it."""
    environment = dataset[env_i]
    chosen = np.unique(np.linspace(0, len(environment) - 1, samples).round().astype(int))
    images, y = environment.gather(chosen), environment.labels[torch.from_numpy(chosen)].to(device)
    is_photographic = images.dtype == torch.uint8
    clean = (normalize(images) if is_photographic else images).to(device)
    cases = [("none", 0), *((kind, severity) for kind in degradations.KINDS for severity in degradations.SEVERITIES)]
    algorithm.eval()
    algorithm.measurements()
    results = []
    for kind, severity in cases:
        x = clean
        if severity:
            x = degradations.degraded_copy(clean, kind, severity, is_photographic, seed_hash(kind, severity))
        accuracy = int(_is_correct(algorithm.predict(x), y).sum()) / len(y)
        case = {"degradation": kind, "severity": severity, "samples": len(y), "accuracy": accuracy}
        results.append({**case, **algorithm.measurements()})
    algorithm.train()
    return results


def _is_correct(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One column means a binary classifier with threshold 0, as in DomainBed."""
    return (logits.squeeze(1) > 0).eq(y) if logits.shape[1] == 1 else logits.argmax(1).eq(y)
