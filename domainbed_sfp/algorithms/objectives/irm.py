"""Invariant risk minimization, IRMv1 (Arjovsky, Bottou, Gulrajani, Lopez-Paz 2019, arXiv 1907.02893)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import AnnealedObjective, Minibatches, ObjectiveAlgorithm, split_logits
from domainbed_sfp.algorithms.registry import register, register_objective
from domainbed_sfp.core.hparam import NOT_NEGATIVE, Hparam

HPARAMS = {
    "irm_lambda": Hparam(
        1e2, lambda r: 10 ** r.uniform(-1, 5), "weight of the IRMv1 penalty once annealed", valid=NOT_NEGATIVE
    ),
    "irm_penalty_anneal_iters": Hparam(
        500, lambda r: int(10 ** r.uniform(0, 4)), "steps at penalty weight 1", valid=NOT_NEGATIVE
    ),
}


def irm_penalty(logits: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the squared gradient of the risk with respect to a scale on the logits.

    The two halves of the batch (even and odd samples) give independent gradients, whose product is
    the estimate (appendix D of the paper).
    """
    scale = torch.ones((), device=logits.device, requires_grad=True)
    halves = [F.cross_entropy(logits[half::2] * scale, y[half::2]) for half in (0, 1)]
    first, second = (torch.autograd.grad(risk, [scale], create_graph=True)[0] for risk in halves)
    return first * second


@register_objective("IRM", HPARAMS)
class IRMObjective(AnnealedObjective):
    """Mean risk over environments plus the mean IRMv1 penalty."""

    weight_hparam = "irm_lambda"
    anneal_hparam = "irm_penalty_anneal_iters"

    def loss(self, algorithm: ObjectiveAlgorithm, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        logits = algorithm.predict(torch.cat([x for x, _ in minibatches]))
        parts = list(split_logits(logits, minibatches))
        nll = sum((F.cross_entropy(part, y) for part, y in parts), torch.zeros((), device=logits.device))
        penalty = sum((irm_penalty(part, y) for part, y in parts if len(y) > 1), torch.zeros((), device=logits.device))
        nll, penalty = nll / len(parts), penalty / len(parts)
        loss = nll + self.penalty_weight() * penalty
        return loss, {"loss": loss.item(), "nll": nll.item(), "penalty": penalty.item()}


@register(
    "IRM", family="objective", reference="Arjovsky et al. 2019, arXiv 1907.02893", standing="reference", hparams=HPARAMS
)
class IRM(ObjectiveAlgorithm):
    """Invariant risk minimization (IRMv1)."""

    objective_name = "IRM"
