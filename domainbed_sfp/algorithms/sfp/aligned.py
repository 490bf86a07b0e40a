"""SFP whose pruned network is aligned with the frozen reference along invariant directions.

A reconstruction of what the abstracts promise ("aligning the pruned model with invariant feature directions"; arXiv
2305.11615, doi 10.1145/3664647.3680969), not of any procedure they give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.algorithms.sfp.algorithm import SFP
from domainbed_sfp.algorithms.sfp.hparams import HPARAMS, REMOVAL_ENERGY, RETIRED
from domainbed_sfp.core.hparam import NOT_NEGATIVE, POSITIVE, Hparam, one_of
from domainbed_sfp.pruning.reconstruction import RECONSTRUCTION
from domainbed_sfp.pruning.spurious import ConditionalMoments, spurious_directions

ALIGNMENT_DIRECTIONS = ("flags", "random", "none")
# Of the logits' distance, as in Hinton et al. 2015 (arXiv 1503.02531), section 2.
TEMPERATURE = 2.0


@register(
    "SFPAligned",
    family="pruning",
    reference="Wang 2024 (PolyU thesis, ch. 4); arXiv 2305.11615; reconstruction of layers as in arXiv 1707.06168",
    standing="reconstruction",
    hparams={
        **HPARAMS,
        "removal": Hparam("none", doc=HPARAMS["removal"].doc, valid=HPARAMS["removal"].valid),
        "alignment": Hparam(
            1.0,
            lambda r: 10 ** r.uniform(-1, 1),
            "weight of the distance between features and the reference's",
            valid=NOT_NEGATIVE,
        ),
        "alignment_logits": Hparam(
            1.0,
            lambda r: 10 ** r.uniform(-1, 1),
            "weight of the distance between logits and the reference's (KL, temperature 2)",
            valid=NOT_NEGATIVE,
        ),
        "alignment_directions": Hparam(
            "flags",
            doc="what is left out of the features' distance: directions in which flagged samples differ (flags), as "
            "many at random, or none",
            valid=one_of(*ALIGNMENT_DIRECTIONS),
        ),
        "alignment_unflagged": Hparam(
            2.0,
            lambda r: r.choice([1.0, 2.0, 5.0]),
            "weight of an unflagged sample in the alignment; a flagged one has 1",
            valid=POSITIVE,
        ),
        "reconstruction": replace(RECONSTRUCTION, default="least_squares", earlier=None),
    },
    retired=RETIRED,
)
class SFPAligned(SFP):
    """Spurious feature-targeted pruning with alignment, reconstructed.

    From `prune_start` on, features f follow those of the frozen reference, r, but for the spurious directions P found
    in them: the loss has the term alignment * sum_i w_i ||(I - P P^T)(f_i - r_i)||^2 / (sum_i w_i * mean ||r||^2),
    where unflagged samples weigh more. Layer by layer the same is done in closed form when channels go: those that
    remain take over what the removed ones told the next layer (`pruning.reconstruction`).
    """

    feature_directions: Tensor

    flags_every_step = True

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        width = self.featurizer.n_outputs
        self.feature_moments = ConditionalMoments(num_classes, width, with_energy=True)
        self.register_buffer("feature_directions", torch.zeros(min(num_classes, width), width))
        # Of the step's samples, (features, logits) of the reference.
        self.followed: tuple[Tensor, Tensor] | None = None

    def reference_logits(self, x: Tensor) -> Tensor:
        featurizer, classifier = self.reference.children()
        features = featurizer(x)
        self.followed = features, classifier(features)
        return self.followed[1]

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        if self.step < self.schedule.first_step(self.total_steps):
            return super().compute_loss(minibatches)
        features: list[Tensor] = []
        handle = self.featurizer.register_forward_hook(lambda module, x, out: features.append(out))
        try:
            loss, metrics = super().compute_loss(minibatches)
        finally:
            handle.remove()
        y, flags = torch.cat([y for _, y in minibatches]), torch.cat(self.flags)
        distance, divergence = self._alignment(torch.cat(features), y, flags)
        metrics = {**metrics, "alignment_distance": distance.item(), "alignment_divergence": divergence.item()}
        total = loss + self.hparams["alignment"] * distance + self.hparams["alignment_logits"] * divergence
        return total, {**metrics, "loss": total.item()}

    def _alignment(self, features: Tensor, y: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
        """(distance of features, divergence of logits) between the network and the reference."""
        assert self.followed is not None
        reference, wanted = self.followed
        self._follow_directions(features.detach().float(), y, flags)
        weights = torch.where(flags, 1.0, self.hparams["alignment_unflagged"])
        weights = weights / weights.sum()
        apart = features.float() - reference.float()
        apart = apart - apart @ self.feature_directions.t() @ self.feature_directions
        scale = reference.float().square().sum(1).mean().clamp_min(1e-12)
        distance = weights @ apart.square().sum(1) / scale
        if not self.hparams["alignment_logits"]:
            return distance, distance.new_zeros(())
        told, wanted = (logits.float() / TEMPERATURE for logits in (self.classifier(features), wanted))
        rows = F.kl_div(F.log_softmax(told, 1), F.log_softmax(wanted, 1), log_target=True, reduction="none").sum(1)
        return distance, TEMPERATURE**2 * weights @ rows

    @torch.no_grad()
    def _follow_directions(self, features: Tensor, y: Tensor, flags: Tensor) -> None:
        self.feature_moments.update(features, y, flags)
        since = self.step - self.schedule.first_step(self.total_steps)
        if self.hparams["alignment_directions"] == "none" or since == 0 or since % self.refresh_every():
            return
        found = spurious_directions(
            self.feature_moments, self.hparams["removal_rank"], REMOVAL_ENERGY, spare_classes=True
        )
        if self.hparams["alignment_directions"] == "random" and len(found):
            found = torch.linalg.qr(torch.randn(found.shape).to(found.device).t())[0].t()
        self.feature_directions.zero_()
        self.feature_directions[: len(found)] = found
        self.diagnostics["alignment_directions"] = float(len(found))
