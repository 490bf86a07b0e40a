"""SFP whose pruned network is aligned with the frozen reference along invariant directions.

A reconstruction of what the abstracts promise ("aligning the pruned model with invariant feature directions"; arXiv
2305.11615, doi 10.1145/3664647.3680969), not of any procedure they give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.algorithms.sfp.algorithm import SFP
from domainbed_sfp.algorithms.sfp.hparams import HPARAMS, REMOVAL_ENERGY, RETIRED
from domainbed_sfp.core.hparam import NOT_NEGATIVE, POSITIVE, Hparam, one_of
from domainbed_sfp.pruning.directions import ConditionalMoments, spurious_directions
from domainbed_sfp.pruning.reconstruction import RECONSTRUCTION, ReaderInputs
from domainbed_sfp.pruning.state import Masks

ALIGNMENT_DIRECTIONS = ("flags", "random", "none")
RECONSTRUCTION_TARGETS = ("reference", "own")
RECONSTRUCTION_SAMPLES = ("all", "unflagged", "hard_environments")
# Of the logits' distance, as in Hinton et al. 2015 (arXiv 1503.02531), section 2.
TEMPERATURE = 2.0


@register(
    "SFPAligned",
    family="pruning",
    reference="Wang 2024 (PolyU thesis, ch. 4); arXiv 2305.11615; reconstruction of layers as in arXiv 1707.06168",
    standing="reconstruction",
    hparams={
        **HPARAMS,
        "removal": replace(HPARAMS["removal"], default="none"),
        # With a reference of 15 % of the run it was behind Taylor, of half of it not (results/NOTES.md, one run each).
        "prune_start": replace(HPARAMS["prune_start"], default=0.5),
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
        "reconstruction": replace(RECONSTRUCTION, earlier=None),
        "reconstruction_target": Hparam(
            "reference",
            doc="what a reconstructed layer is to make: what the reference's makes of the same images (reference), or "
            "what it made itself before channels went (own)",
            valid=one_of(*RECONSTRUCTION_TARGETS),
            earlier="own",
        ),
        "reconstruction_samples": Hparam(
            "all",
            doc="which samples count more where layers are reconstructed: unflagged ones, as in the alignment; those "
            "of environments in which the reference's loss is higher (hard_environments); or none (all)",
            valid=one_of(*RECONSTRUCTION_SAMPLES),
            earlier="all",
        ),
    },
    retired={name: value for name, value in RETIRED.items() if name != "reconstruction"},
)
class SFPAligned(SFP):
    """Spurious feature-targeted pruning with alignment, reconstructed.

    From `prune_start` on, features f follow those of the frozen reference, r, but for the spurious directions P found
    in them: the loss has the term alignment * sum_i w_i ||(I - P P^T)(f_i - r_i)||^2 / (sum_i w_i * mean ||r||^2),
    where unflagged samples weigh more; another term draws the logits to the reference's.

    With `reconstruction` least_squares the same is done in closed form when channels go: what is left of a layer is set
    such that it makes what the reference's makes of the same images (`pruning.reconstruction`). For that the layers
    lose all of their channels one after another in the order of the network, from `prune_start` to `prune_end`; which
    channels go is decided once, when the first do.
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
        # Which units will live, once that is decided; until then all.
        self.planned = Masks(self.unit_shapes)
        # Of the step's samples, (features, logits) of the reference, and what its layers read.
        self.followed: tuple[Tensor, Tensor] | None = None
        self.told: ReaderInputs | None = None

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.step == self.schedule.first_step(self.total_steps):
            self.reconstruction.forget()
        return super().update(minibatches, unlabeled)

    def reference_logits(self, x: Tensor) -> Tensor:
        featurizer, classifier = self.reference.children()
        due = self.step <= self.schedule.last_step(self.total_steps)
        with self.reconstruction.watch(self._reference_by_name(), due and self._follows()) as self.told:
            features = featurizer(x)
            self.followed = features, classifier(features)
        return self.followed[1]

    def _follows(self) -> bool:
        return self.hparams["reconstruction"] != "none" and self.hparams["reconstruction_target"] == "reference"

    def _reference_by_name(self) -> nn.Module:
        """The reference with its two parts under the names that they have in parameters' names."""
        featurizer, classifier = self.reference.children()
        return nn.ModuleDict({"featurizer": featurizer, "classifier": classifier})

    def followed_network(self) -> nn.Module | None:
        return self._reference_by_name() if self._follows() else None

    def choose_alive(self, minibatches: Minibatches, sparsity: float) -> dict[str, Tensor]:
        if not self._follows():
            return super().choose_alive(minibatches, sparsity)
        if all(self.planned[name].all() for name in self.planned.names):
            for name, keep in super().choose_alive(minibatches, self.schedule.sparsity).items():
                self.planned.set(name, keep)
        first, last = (edge(self.total_steps) for edge in (self.schedule.first_step, self.schedule.last_step))
        done = len(self.groups) * (self.step - first) // max(1, last - first) if self.step < last else len(self.groups)
        return {
            group.name: (self.planned if index < done else self.unit_masks)[group.name]
            for index, group in enumerate(self.groups)
        }

    def renew_masks(self, minibatches: Minibatches) -> None:
        super().renew_masks(minibatches)
        if self._follows():
            self.reconstruction.forget()  # what later layers read is another now

    def take_inputs(self, seen: ReaderInputs, minibatches: Minibatches) -> None:
        has_reference = self.step >= self.schedule.first_step(self.total_steps)
        told = self.told if has_reference and self._follows() else None
        self.reconstruction.take(seen, self.sample_weights(minibatches) if has_reference else None, told)
        self.told = None

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        if self.step < self.schedule.first_step(self.total_steps):
            return super().compute_loss(minibatches)
        made: dict[nn.Module, list[Tensor]] = {self.featurizer: [], self.classifier: []}
        handles = [part.register_forward_hook(lambda part, x, out: made[part].append(out)) for part in made]
        try:
            loss, metrics = super().compute_loss(minibatches)
        finally:
            for handle in handles:
                handle.remove()
        features, logits = (torch.cat(parts) for parts in made.values())
        y, flags = torch.cat([y for _, y in minibatches]), torch.cat(self.flags)
        distance, divergence = self._alignment(features, logits, y, flags)
        metrics = {**metrics, "alignment_distance": distance.item(), "alignment_divergence": divergence.item()}
        total = loss + self.hparams["alignment"] * distance + self.hparams["alignment_logits"] * divergence
        return total, {**metrics, "loss": total.item()}

    def _alignment(self, features: Tensor, logits: Tensor, y: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
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
        told, wanted = (each.float() / TEMPERATURE for each in (logits, wanted))
        rows = F.kl_div(F.log_softmax(told, 1), F.log_softmax(wanted, 1), log_target=True, reduction="none").sum(1)
        return distance, TEMPERATURE**2 * weights @ rows

    def sample_weights(self, minibatches: Minibatches) -> Tensor | None:
        """[N]: how much each sample counts in the reconstruction; None: alike."""
        which = self.hparams["reconstruction_samples"]
        if which == "all":
            return None
        if which == "unflagged":
            return torch.where(torch.cat(self.flags), 1.0, self.hparams["alignment_unflagged"])
        losses = self.flagging.loss_sums.sum(1) / self.flagging.loss_counts.sum(1)
        return torch.cat([loss.expand(len(y)) for loss, (_, y) in zip(losses, minibatches)])

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
