"""SFP, spurious feature-targeted pruning (Wang, PolyU thesis 2024, ch. 4; arXiv 2212.09458, 2305.11615; ACM MM 2024,
doi 10.1145/3664647.3680969). This project's reconstruction: the papers' method section does not determine it.

What the papers state: in-domain samples that carry spurious features have a lower empirical risk; flag the samples
whose loss lies under a threshold, and weaken the projection of the flagged samples' features into model space, so that
the branches that fit spurious features become sparse; directions are analysed through an SVD; there is no global
sparsity penalty.

Why a low loss tells: see `flags`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp import networks
from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.algorithms.sfp.flags import Flags
from domainbed_sfp.algorithms.sfp.hparams import HPARAMS, REFRESH, RETIRED, STATISTICS_EVERY, choices
from domainbed_sfp.algorithms.sfp.removal import Removal, cleared_layers
from domainbed_sfp.algorithms.sfp.statistics import ChannelScores, LayerInputs, channel_means
from domainbed_sfp.core.hparam import POSITIVE, Hparam
from domainbed_sfp.pruning import scores


@register(
    "SFP",
    family="pruning",
    reference="Wang 2024 (PolyU thesis, ch. 4); arXiv 2212.09458; doi 10.1145/3664647.3680969",
    standing="reconstruction",
    hparams=HPARAMS,
    retired=RETIRED,
)
class SFP(ScheduledPruning):
    """Spurious feature-targeted pruning, reconstructed.

    Dense training until `prune_start`; then a frozen copy of the network, the reference, flags the samples of low loss.
    Flagged and unflagged samples of the same class are compared: input directions in which they differ are taken out of
    the weights of the regularised layers (W <- W (I - P P^T) after every step), and channels in which they differ most
    (in a pretrained network: those of the lowest Taylor score) are pruned on the cubic ramp. Granularity `channel`.
    `channel_score` "unflagged" keeps the channels that matter to unflagged samples (see `ChannelScores`).

    In a network trained from scratch, directions are found among channel means scaled to length 1 (`removal_vectors`):
    how bright an image is differs between flagged and unflagged samples, too, and would tilt them. They are renewed on
    the way, and only those are taken along which the samples differ beyond chance (`pruning.directions`). In a
    pretrained network they are found once and stay: moving ones take out more and more of what it knows.

    Metrics of `domain{d}` are those of the d-th training environment.
    """

    objective_name = "ERM"

    # Whether a subclass needs flags at every step, whatever else does.
    flags_every_step = False

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.is_pretrained = networks.is_pretrained(self.input_shape, self.hparams)
        self.chosen = choices(self.hparams, self.is_pretrained, max(self.input_shape[1:]))
        # Kept from the start, so that a checkpoint always finds its place; it takes the weights at `prune_start`.
        self.reference = copy.deepcopy(self.network).requires_grad_(False)
        self.flagging = Flags(num_domains, num_classes, self.hparams)
        self.channel_scores = ChannelScores(self.chosen["channel_score"], self.groups, num_classes)
        cleared = {}
        if self.hparams["removal"] != "none":
            cleared = cleared_layers(self.featurizer, self.groups, self.chosen["removal_layers"])
        self.removal = Removal(
            cleared, num_classes, self.hparams["removal_rank"], self.chosen["removal_vectors"] == "relative"
        )
        self.captured: LayerInputs | None = None
        # Of the step's samples: their flags, domain by domain, and which are unflagged in a domain with contrast.
        self.flags: list[Tensor] = []
        self.unflagged: Tensor | None = None
        # What the last statistics were; repeated until the next, so that every record has some.
        self.diagnostics: dict[str, float] = {}

    # training ---------------------------------------------------------------------------------------------------------

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.step == self.schedule.first_step(self.total_steps):
            self.reference.load_state_dict(self.network.state_dict())
        metrics = super().update(minibatches, unlabeled)
        return {**metrics, **self.diagnostics}

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        since = self.steps_of_reference()
        if since < 0:
            return super().compute_loss(minibatches)
        due = self._statistics_are_due(since)
        if not due and self.hparams["risk_weight"] == 1 and not self.flags_every_step:
            return super().compute_loss(minibatches)
        self.flags = self._flag(minibatches)
        if not due:
            return self.weighted_loss(minibatches, self.flags)
        watched = {**self.channel_scores.watched(), **self.removal.channels}
        sensitive = self.channel_scores.sensitive()
        layers = {name: self._layer(name) for name in [*watched, *sorted(sensitive - watched.keys())]}
        with LayerInputs(layers, sensitive) as self.captured:
            loss, metrics = self.weighted_loss(minibatches, self.flags)
        if since > self.refresh_every():  # before, none have been looked for
            for name in self.removal.channels:
                layer = name.removeprefix("featurizer.").removesuffix(".weight")
                self.diagnostics[f"directions_{layer}"] = float(len(self.removal.directions(name)))
        penalty = self._take_statistics(minibatches, self.captured)
        if self.hparams["removal"] == "soft":
            self.diagnostics["projection_penalty"] = penalty.item()
        return loss + penalty, metrics

    def after_backward(self) -> None:
        if self.channel_scores.kind == "taylor":
            self.channel_scores.take_taylor(dict(self.named_parameters()))
        elif self.channel_scores.kind == "unflagged" and self.captured is not None and self.unflagged is not None:
            self.channel_scores.take_unflagged(self.captured, self.unflagged)
        self.captured = self.unflagged = None

    def before_masks(self) -> None:
        if self.step == self.schedule.last_step(self.total_steps):
            self._check_contrast()  # where nothing is pruned, nobody else asks
        if self._directions_are_due():
            self.removal.renew()
        if self.hparams["removal"] == "hard":
            names = self.removal.channels
            masks = {name: self.weight_masks[name] for name in names if name in self.weight_masks.names}
            self.removal.project({name: self._layer(name).weight for name in names}, masks)

    def score(self, minibatches: Minibatches) -> scores.Scores:
        self._check_contrast()
        return self.channel_scores.scores()

    def renew_masks(self, minibatches: Minibatches) -> None:
        super().renew_masks(minibatches)
        self.removal.living = {}

    def decisions(self) -> dict[str, str]:
        return dict(self.chosen)

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "diagnostics": dict(self.diagnostics)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.diagnostics = dict(state["diagnostics"])
        self.removal.living = {}

    def reference_logits(self, x: Tensor) -> Tensor:
        """Logits [N, K] of the frozen copy."""
        return self.reference(x)

    def weighted_loss(self, minibatches: Minibatches, flags: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy; with risk weights such in which unflagged samples weigh `risk_weight` times more. A
        domain without contrast has no unflagged samples to speak of: all of its samples weigh the same."""
        if self.hparams["risk_weight"] == 1:
            return super().compute_loss(minibatches)
        x, y = torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])
        light = torch.cat([flagged | ~use for flagged, use in zip(flags, self.flagging.has_contrast())])
        weights = torch.where(light, 1.0, self.hparams["risk_weight"])
        losses = F.cross_entropy(self.predict(x), y, reduction="none")
        loss = (weights * losses).sum() / weights.sum()
        return loss, {"loss": loss.item()}

    # when -------------------------------------------------------------------------------------------------------------

    def steps_of_reference(self) -> int:
        """Steps since the reference was taken; negative before."""
        return self.step - self.schedule.first_step(self.total_steps)

    def refresh_every(self) -> int:
        """Steps between two renewals of the directions."""
        return max(1, round(REFRESH * self.total_steps))

    def _statistics_are_due(self, since: int) -> bool:
        """The soft penalty, and a pretrained network whose directions are still to be found, need them at each step."""
        looks = self.is_pretrained and since <= self.refresh_every() and bool(self.removal.channels)
        return since % STATISTICS_EVERY == 0 or self.hparams["removal"] == "soft" or looks

    def _directions_are_due(self) -> bool:
        since, names = self.steps_of_reference(), self.removal.channels
        if not names or since <= 0 or since % self.refresh_every() or not self.flagging.has_contrast().any():
            return False
        return not self.is_pretrained or not any(len(self.removal.directions(name)) for name in names)

    # what is learned of flagged samples -------------------------------------------------------------------------------

    @torch.no_grad()
    def _flag(self, minibatches: Minibatches) -> list[Tensor]:
        """Bool [N] per domain: which samples seem to rest on a spurious attribute."""
        self.reference.eval()
        flags, metrics = self.flagging.flag(self.reference_logits(torch.cat([x for x, _ in minibatches])), minibatches)
        others = {name: value for name, value in self.diagnostics.items() if not name.startswith("flag")}
        self.diagnostics = {**others, **metrics}
        return flags

    def _take_statistics(self, minibatches: Minibatches, seen: LayerInputs) -> Tensor:
        """Updates scores and directions' moments from what the layers have just seen; returns the soft penalty (0
        unless asked for)."""
        self.flagging.warn_without_contrast(self.step)
        useful = self.flagging.has_contrast().tolist()
        penalty = self.flagging.loss_sums.new_zeros(())
        if not any(useful):
            return penalty
        kept = torch.cat([torch.full_like(flagged, use) for flagged, use in zip(self.flags, useful)])
        self.unflagged = kept & ~torch.cat(self.flags)
        labels, flagged = torch.cat([y for _, y in minibatches])[kept], torch.cat(self.flags)[kept]
        watched = self.channel_scores.watched()
        for name in seen.inputs:  # in the order of the network
            if name not in watched and name not in self.removal.channels:
                continue  # one of several readers of a group, captured for its sensitivity alone
            layer, x = self._layer(name), seen.by_image(name, len(kept))
            channels = watched.get(name) or self.removal.channels[name]
            vectors = channel_means(x.detach().float()[kept], layer, channels)
            if name in watched:
                self.channel_scores.take(name, vectors, labels, flagged)
            if name in self.removal.channels:
                self.removal.take(name, vectors, labels, flagged)
                if self.hparams["removal"] == "soft" and flagged.any():
                    penalty = penalty + self.removal.passed_on(name, layer, x[kept][flagged])
        return self.hparams["removal_strength"] * penalty

    def _check_contrast(self) -> None:
        # Without anything that depends on flags it is Taylor.
        needed = self.hparams["removal"] != "none" or self.hparams["risk_weight"] != 1
        if needed or self.channel_scores.kind != "taylor":
            self.flagging.check_contrast()

    def _layer(self, name: str) -> Any:
        return self.get_submodule(name.removesuffix(".weight"))


@register(
    "SFPWeighted",
    family="pruning",
    reference="Wang 2024 (PolyU thesis, ch. 4) + risk weights as in LfF (arXiv 2007.02561), JTT (arXiv 2107.09044)",
    standing="reconstruction",
    hparams={
        **HPARAMS,
        "risk_weight": Hparam(
            20.0, lambda r: r.choice([2.0, 5.0, 20.0, 50.0]), "weight of unflagged samples in the risk", valid=POSITIVE
        ),
    },
    retired=RETIRED,
)
class SFPWeighted(SFP):
    """SFP whose unflagged samples weigh more in the risk, which weakens the flagged samples' share in the model.

    A reconstruction too; close to LfF and JTT, and therefore named in every row that uses it.
    """
