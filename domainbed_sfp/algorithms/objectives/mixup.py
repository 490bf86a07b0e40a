"""Inter-domain mixup (Yan et al. 2020, arXiv 2001.00677; Xu et al. 2020, arXiv 1912.01805)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches, Objective, ObjectiveAlgorithm
from domainbed_sfp.algorithms.registry import register, register_objective
from domainbed_sfp.core.hparam import POSITIVE, Hparam

HPARAMS = {
    "mixup_alpha": Hparam(0.2, lambda r: 10 ** r.uniform(-1, 1), "Beta(alpha, alpha) mixes two samples", valid=POSITIVE)
}


@register_objective("Mixup", HPARAMS)
class MixupObjective(Objective):
    """Convex combinations of samples of two environments, each environment paired with its successor in a
    random order. The pairing is drawn from torch's generator and the weights from numpy's, as in DomainBed."""

    mixes_environments = True

    def loss(self, algorithm: ObjectiveAlgorithm, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        alpha = self.hparams["mixup_alpha"]
        order = torch.randperm(len(minibatches)).tolist()
        terms = []
        for position, first in enumerate(order):
            x1, y1 = minibatches[first]
            x2, y2 = minibatches[order[(position + 1) % len(order)]]
            n = min(len(x1), len(x2))
            weight = np.random.beta(alpha, alpha)
            logits = algorithm.predict(weight * x1[:n] + (1 - weight) * x2[:n])
            terms.append(weight * F.cross_entropy(logits, y1[:n]) + (1 - weight) * F.cross_entropy(logits, y2[:n]))
        loss = torch.stack(terms).mean()
        return loss, {"loss": loss.item()}


@register(
    "Mixup", family="objective", reference="Yan et al. 2020, arXiv 2001.00677", standing="reference", hparams=HPARAMS
)
class Mixup(ObjectiveAlgorithm):
    """Inter-domain mixup."""

    objective_name = "Mixup"
