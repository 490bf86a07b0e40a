"""Empirical risk minimization (Vapnik 1998), DomainBed's baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches, Objective, ObjectiveAlgorithm
from domainbed_sfp.algorithms.registry import register, register_objective


@register_objective("ERM")
class ERMObjective(Objective):
    """Mean cross-entropy over the samples of all environments."""

    def loss(self, algorithm: ObjectiveAlgorithm, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        x = torch.cat([x for x, _ in minibatches])
        y = torch.cat([y for _, y in minibatches])
        loss = F.cross_entropy(algorithm.predict(x), y)
        return loss, {"loss": loss.item()}


@register("ERM", family="objective", reference="Vapnik 1998", standing="reference")
class ERM(ObjectiveAlgorithm):
    """Empirical risk minimization."""

    objective_name = "ERM"
