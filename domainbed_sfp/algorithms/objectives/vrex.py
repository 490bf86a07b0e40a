"""Variance risk extrapolation, V-REx (Krueger et al. 2021, arXiv 2003.00688)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import AnnealedObjective, Minibatches, ObjectiveAlgorithm, split_logits
from domainbed_sfp.algorithms.registry import register, register_objective
from domainbed_sfp.core.hparam import NOT_NEGATIVE, Hparam

HPARAMS = {
    "vrex_lambda": Hparam(
        1e1, lambda r: 10 ** r.uniform(-1, 5), "weight of the variance once annealed", valid=NOT_NEGATIVE
    ),
    "vrex_penalty_anneal_iters": Hparam(
        500, lambda r: int(10 ** r.uniform(0, 4)), "steps at penalty weight 1", valid=NOT_NEGATIVE
    ),
}


@register_objective("VREx", HPARAMS)
class VRExObjective(AnnealedObjective):
    """Mean risk over environments plus the variance of their risks (eq. 7)."""

    weight_hparam = "vrex_lambda"
    anneal_hparam = "vrex_penalty_anneal_iters"

    def loss(self, algorithm: ObjectiveAlgorithm, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        logits = algorithm.predict(torch.cat([x for x, _ in minibatches]))
        risks = torch.stack([F.cross_entropy(part, y) for part, y in split_logits(logits, minibatches)])
        penalty = ((risks - risks.mean()) ** 2).mean()
        loss = risks.mean() + self.penalty_weight() * penalty
        # DomainBed logs the last environment's risk under `nll`; the mean is what the name says.
        return loss, {"loss": loss.item(), "nll": risks.mean().item(), "penalty": penalty.item()}


@register(
    "VREx", family="objective", reference="Krueger et al. 2021, arXiv 2003.00688", standing="reference", hparams=HPARAMS
)
class VREx(ObjectiveAlgorithm):
    """Variance risk extrapolation."""

    objective_name = "VREx"
