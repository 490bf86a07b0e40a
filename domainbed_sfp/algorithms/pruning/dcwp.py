"""DCWP, debiased contrastive weight pruning (Park, Lee, Lee, Ye 2023, "Training Debiased Subnetworks with Contrastive
Weight Pruning", CVPR 2023, arXiv 2210.05247)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.gated import LEARNED_MASK_HPARAMS, LEARNED_MASK_RETIRED, LearnedMaskPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import NOT_NEGATIVE, POSITIVE, RUN_FRACTION, Hparam

# Of the generalized cross-entropy that trains the biased model.
GCE_Q = 0.7
CONTRASTIVE_TEMPERATURE = 0.07
# Weight of a bias-conflicting sample in the mask stage, as in the authors' code.
MASK_UPWEIGHT = 80.0


@register(
    "DCWP",
    family="pruning",
    reference="Park et al. 2023 (CVPR), arXiv 2210.05247",
    hparams={
        **LEARNED_MASK_HPARAMS,
        # The proportions of the authors' code: 2,000, 2,000 and 500 steps.
        "mask_start": Hparam(
            0.44,
            doc="fraction of the run at which training stops and the mask is learned",
            valid=RUN_FRACTION,
            earlier=0.44,
        ),
        "mask_end": Hparam(
            0.89,
            doc="fraction of the run at which the mask is final and retraining begins",
            valid=RUN_FRACTION,
            earlier=0.89,
        ),
        "retrain_upweight": Hparam(
            20.0,
            lambda r: r.choice([10.0, 20.0, 50.0]),
            "the paper's lambda_up: weight of a bias-conflicting sample in retraining",
            valid=POSITIVE,
        ),
        "contrastive_weight": Hparam(
            0.05, doc="the paper's lambda_align: weight of the debiased contrastive loss", valid=NOT_NEGATIVE
        ),
    },
    retired={
        **LEARNED_MASK_RETIRED,
        "mask_upweight": MASK_UPWEIGHT,
    },
)
class DCWP(LearnedMaskPruning):
    """Finds the bias-conflicting samples, learns a mask that does well on them, retrains with more weight on them.

    Stage 1 trains the network with ERM and, beside it, a biased model with generalized cross-entropy (q = .7). From
    then on the bias-conflicting samples are those that the biased model gets wrong; group labels are not used. Stage 2
    learns the mask logits on cross-entropy + alpha * sum(logits) + .05 * debiased contrastive loss, bias-conflicting
    samples weighing 80 times the others. Stage 3 trains the masked weights on from where stage 1 left them (nothing is
    rewound), with weight 20 and the contrastive loss. By default the stages have the proportions of the authors' code:
    2,000, 2,000 and 500 steps.

    A deviation: the authors draw samples with these weights from the whole set. Here a batch is what the loop gives,
    and its samples are weighted instead (drawing 80:1 within a batch would repeat a few of them), relative to the
    weights of that batch; one without conflicting samples weighs aligned ones fully. In the contrastive loss the
    anchors are weighted, positives and negatives are the batch's.
    """

    objective_name = "ERM"

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        self.mask_start, self.mask_end = hparams["mask_start"], hparams["mask_end"]
        if self.mask_end < self.mask_start:
            raise UserError(f"masks end before they begin: mask_start {self.mask_start}, mask_end {self.mask_end}")
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.biased = copy.deepcopy(self.network)
        self.biased_optimizer = torch.optim.Adam(
            self.biased.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.step >= self.first_gate_step():
            return super().update(minibatches, unlabeled)
        biased_loss = self._train_biased(minibatches)
        return {**super().update(minibatches, unlabeled), "biased_loss": biased_loss}

    def begin_retraining(self) -> None:
        self.optimizer = self.make_optimizer()

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        if self.step < self.first_gate_step():
            return super().compute_loss(minibatches)
        x, y = torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])
        conflicting = self._is_conflicting(x, y)
        upweight = MASK_UPWEIGHT if self.gates_are_open() else self.hparams["retrain_upweight"]
        weights = torch.where(conflicting, upweight, 1.0)
        features = self.features(x)
        losses = F.cross_entropy(self.classify(features), y, reduction="none")
        risk = (weights * losses).sum() / weights.sum()
        contrast = debiased_contrastive(F.normalize(features, dim=1), y, conflicting, weights, CONTRASTIVE_TEMPERATURE)
        loss = risk + self.hparams["contrastive_weight"] * contrast
        return loss, {
            "loss": loss.item(),
            "contrastive_loss": contrast.item(),
            "conflicting": conflicting.float().mean().item(),
        }

    def _train_biased(self, minibatches: Minibatches) -> float:
        x, y = torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])
        loss = generalized_cross_entropy(self.biased(x), y, GCE_Q)
        self.biased_optimizer.zero_grad()
        loss.backward()
        self.biased_optimizer.step()
        return loss.item()

    @torch.no_grad()
    def _is_conflicting(self, x: Tensor, y: Tensor) -> Tensor:
        self.biased.eval()
        return self.biased(x).argmax(1) != y


def generalized_cross_entropy(logits: Tensor, y: Tensor, q: float) -> Tensor:
    """Mean of (1 - p_y^q) / q (Zhang & Sabuncu 2018, arXiv 1805.07836, eq. 6).

    A sample's gradient is p_y^q times that of its cross-entropy: what is easy weighs more and more.
    """
    # Through the logarithm: the derivative of p^q itself is infinite at p = 0.
    log_p = F.log_softmax(logits, dim=1).gather(1, y[:, None]).squeeze(1)
    return ((1 - torch.exp(q * log_p)) / q).mean()


def debiased_contrastive(
    features: Tensor, y: Tensor, conflicting: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, eq. 2) with the bias-conflicting samples of
    the anchor's class as positives: it draws every sample's features to theirs.

    Args:
        features: of unit length, [N, D].
        y: classes [N].
        conflicting: bool [N].
        weights: of the anchors, [N]. An anchor without positives does not count; without any the loss is 0.
    """
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    similarity = features @ features.t() / temperature
    log_p = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (y[:, None] == y[None, :]) & conflicting[None, :] & ~itself
    counts = positive.sum(1)
    used = counts > 0
    if not used.any():
        return features.new_zeros(())
    losses = -(log_p * positive)[used].sum(1) / counts[used]
    return (weights[used] * losses).sum() / weights[used].sum()
