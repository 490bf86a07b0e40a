"""Distributionally robust optimization over groups (Sagawa et al. 2020, arXiv 1911.08731, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches, Objective, ObjectiveAlgorithm
from domainbed_sfp.algorithms.registry import register, register_objective
from domainbed_sfp.core.hparam import NOT_NEGATIVE, Hparam

HPARAMS = {
    "groupdro_eta": Hparam(
        1e-2, lambda r: 10 ** r.uniform(-3, -1), "step size of the group weights", valid=NOT_NEGATIVE
    )
}


@register_objective("GroupDRO", HPARAMS)
class GroupDROObjective(Objective):
    """Risks weighted by exponentiated-gradient weights `q`, one per environment."""

    domain_by_domain = True

    q: Tensor

    def __init__(self, hparams: Mapping[str, Any], num_domains: int) -> None:
        super().__init__(hparams, num_domains)
        self.register_buffer("q", torch.ones(num_domains))

    def loss(self, algorithm: ObjectiveAlgorithm, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        # One forward pass per environment, as in DomainBed: it matters where BatchNorm sees the batch.
        risks = torch.stack([F.cross_entropy(algorithm.predict(x), y) for x, y in minibatches])
        with torch.no_grad():
            self.q *= (self.hparams["groupdro_eta"] * risks).exp()
            self.q /= self.q.sum()
        loss = torch.dot(risks, self.q)
        return loss, {"loss": loss.item()}


@register(
    "GroupDRO",
    family="objective",
    reference="Sagawa et al. 2020, arXiv 1911.08731",
    standing="reference",
    hparams=HPARAMS,
)
class GroupDRO(ObjectiveAlgorithm):
    """Group distributionally robust optimization."""

    objective_name = "GroupDRO"
