"""SFP, spurious feature-targeted pruning (Wang, PolyU thesis 2024, ch. 4; arXiv 2212.09458, 2305.11615; ACM MM 2024,
doi 10.1145/3664647.3680969). This project's reconstruction: the papers' method section does not determine it.

What the papers state: in-domain samples that carry spurious features have a lower empirical risk; flag the samples
whose loss lies under a threshold, and weaken the projection of the flagged samples' features into model space, so that
the branches that fit spurious features become sparse; directions are analysed through an SVD; there is no global
sparsity penalty.

Why a loss below the domain's mean flags them. If an attribute predicts the label with probability p_s in a domain and
the invariant features do with p_i < p_s, a model trained for a while rests on the attribute: its loss is near -log p_s
where attribute and label agree and far above where they do not. The mean loss lies between and separates them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.algorithms.scheduled_pruning import PRUNING_HPARAMS, ScheduledPruning
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.hparam import (
    AT_LEAST_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Hparam,
    Range,
    but,
    one_of,
    only,
)
from domainbed_sfp.networks.introspection import uses_weight_as_is
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.spurious import ConditionalMoments, remove_directions, spurious_directions

FLAG_POLICIES = ("loss", "random", "oracle")
FLAG_THRESHOLDS = ("environment", "class")
REMOVALS = ("hard", "soft", "none")
REMOVAL_SPARES = ("class_means", "nothing")
REMOVAL_VECTORS = ("auto", "relative", "absolute")
REMOVAL_LAYERS = ("auto", "first", "last", "all")
CHANNEL_SCORES = ("auto", "class_conditional", "taylor", "unflagged")

# A flagged share outside this range gives no contrast between flagged and unflagged samples.
CONTRAST = (0.05, 0.98)
# What is kept of each domain, its mean losses under the reference and its flagged share, forgets with this factor.
DECAY = 0.97
# Scores from gradients, `taylor` and `unflagged`, are averaged over the steps with this factor.
GRADIENT_MOMENTUM = 0.9
# A direction is followed while this much of its length lies on inputs that live.
LIVING = 0.1
# Of a pretrained network the last part only: truncating everything takes what it knows (25 points on PACS: seen).
LAST_PART = 0.25

HPARAMS = {
    **PRUNING_HPARAMS,
    "granularity": Hparam("channel", doc="channel (structured)", valid=only("channel", "it prunes channels")),
    "objective": Hparam(
        "ERM",
        doc="training objective: ERM, IRM, VREx, GroupDRO or CORAL; with risk weights ERM",
        valid=but("Mixup", "it compares samples, and that mixes them"),
    ),
    "flag_policy": Hparam(
        "loss",
        doc="loss: below the threshold; random: as many at random; oracle: the truth",
        valid=one_of(*FLAG_POLICIES),
    ),
    "flag_kappa": Hparam(
        1.0, lambda r: r.choice([0.75, 1.0]), "flagged below kappa times the domain's mean loss", valid=POSITIVE
    ),
    "flag_threshold": Hparam(
        "environment",
        doc="mean loss of the environment, or of each class in it (class)",
        valid=one_of(*FLAG_THRESHOLDS),
    ),
    "removal": Hparam(
        "hard", doc="hard: project weights; soft: penalise the projection; none", valid=one_of(*REMOVALS)
    ),
    "removal_layers": Hparam(
        "auto",
        doc="first, last (quarter), all; auto: first, or last where pretrained",
        valid=one_of(*REMOVAL_LAYERS),
    ),
    "removal_rank": Hparam(
        0.6,
        lambda r: r.choice([0.4, 0.6, 0.8]),
        "share of the possible directions removed: of one less than there are classes, or of the layer's inputs where "
        "those are fewer, but never of all inputs (of three colours 1 or 2)",
        valid=Range("a share in (0, 1]", lambda value: 0 < value <= 1),
    ),
    "removal_spares": Hparam(
        "nothing",
        doc="class_means: directions that tell classes apart stay; nothing",
        valid=one_of(*REMOVAL_SPARES),
    ),
    "removal_vectors": Hparam(
        "auto",
        doc="what directions are found among: relative (a layer's channel means, of length 1), absolute (as they are); "
        "auto: the first where images are not normalised (digits) and nothing is pretrained, else the second",
        valid=one_of(*REMOVAL_VECTORS),
    ),
    "removal_energy": Hparam(0.2, doc="share of its energy a layer's input keeps at least", valid=SHARE),
    "removal_strength": Hparam(10.0, lambda r: 10 ** r.uniform(0, 3), "weight of the soft penalty", valid=NOT_NEGATIVE),
    "channel_score": Hparam(
        "auto",
        doc="class_conditional; taylor; unflagged: what a channel does for unflagged samples; auto: the first, or the "
        "second where pretrained",
        valid=one_of(*CHANNEL_SCORES),
    ),
    "risk_weight": Hparam(1.0, doc="weight of unflagged samples in the risk; 1 weighs all alike", valid=POSITIVE),
    "statistics_every": Hparam(
        4,
        doc="steps between two updates of flags and statistics; risk weights need flags always, the soft penalty and a "
        "pretrained network whose directions are still to be found need both",
        valid=AT_LEAST_ONE,
    ),
    "refresh": Hparam(
        0.05,
        doc="fraction of the run between two renewals of the directions; a pretrained network's are found once, so "
        "long after prune_start",
        valid=FRACTION,
    ),
}


@register(
    "SFP",
    family="pruning",
    reference="Wang 2024 (PolyU thesis, ch. 4); arXiv 2212.09458; doi 10.1145/3664647.3680969",
    standing="reconstruction",
    hparams=HPARAMS,
)
class SFP(ScheduledPruning):
    """Spurious feature-targeted pruning, reconstructed.

    Dense training until `prune_start`; then a frozen copy of the network, the reference, flags the samples of low loss.
    Flagged and unflagged samples of the same class are compared: input directions in which they differ are taken out of
    the weights of the regularised layers (W <- W (I - P P^T) after every step), and channels in which they differ most
    (in a pretrained network: those of the lowest Taylor score) are pruned on the cubic ramp. Granularity `channel`.

    `channel_score` "unflagged" keeps the channels that matter to unflagged samples: the mean over them of (dL/dz)^2,
    where z is a gate on all that later layers read of the channel for one sample. Over all samples that is Fisher
    pruning (Theis et al. 2018, arXiv 1801.05787).

    In a network trained from scratch, directions are found among channel means scaled to length 1 (`removal_vectors`):
    how bright an image is differs between flagged and unflagged samples, too, and would tilt them. They are renewed on
    the way, and only those are taken along which the samples differ beyond chance (`pruning.spurious`). In a
    pretrained network they are found once and stay: moving ones take out more and more of what it knows. There a sample
    of low loss may just be one whose class is easy to see, and flagged samples differ from others along what tells
    classes apart: with `removal_spares` "class_means" that part is left out of the directions. Of few input channels
    class means span all, and nothing would be left to remove.

    Metrics of `domain{d}` are those of the d-th training environment.
    """

    loss_sums: Tensor
    loss_counts: Tensor
    flag_counts: Tensor

    # Whether a subclass needs flags at every step, whatever else does.
    flags_every_step = False

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self._check_hparams()
        self.is_pretrained = networks.is_pretrained(self.input_shape, self.hparams)
        self.channel_score = self.hparams["channel_score"]
        if self.channel_score == "auto":
            # The contrast alone takes channels a pretrained network cannot do without (PACS: 15 points in domain).
            self.channel_score = "taylor" if self.is_pretrained else "class_conditional"
        self.removal_vectors = self.hparams["removal_vectors"]
        if self.removal_vectors == "auto":
            # How much ink a digit has differs between flagged and unflagged samples, too, and would tilt the directions
            # away from an axis of colour. Behind many layers lengths are part of what a pretrained network knows.
            # Photographs are normalised: there the origin is grey, and scaling would tell light from dark all the more.
            is_raw = max(self.input_shape[1:]) <= networks.SMALL_IMAGE_SIDE
            self.removal_vectors = "relative" if is_raw and not self.is_pretrained else "absolute"
        # Kept from the start, so that a checkpoint always finds its place; it takes the weights at `prune_start`.
        self.reference = copy.deepcopy(self.network).requires_grad_(False)
        # Decayed sums over the samples of a domain and class: losses, samples, flagged samples.
        for name in ("loss_sums", "loss_counts", "flag_counts"):
            self.register_buffer(name, torch.zeros(num_domains, num_classes))
        # At the last reader: there a residual stream holds what all its layers have written.
        self.moments = nn.ModuleDict(
            {_key(group.readers[-1]): ConditionalMoments(num_classes, group.channels) for group in self.groups}
        )
        self.layers = self._regularised_layers()
        self.layer_moments = nn.ModuleDict()
        for name in self.layers:
            channels = self._layer(name).weight.shape[1]
            self.layer_moments[_key(name)] = ConditionalMoments(num_classes, channels, with_energy=True)
            self.register_buffer(_directions(name), torch.zeros(channels, channels))
        if self.channel_score in ("taylor", "unflagged"):
            for group in self.groups:
                self.register_buffer(f"{self.channel_score} {_key(group.name)}", torch.zeros(group.channels))
        self.captured: _Capture | None = None
        self.unflagged: Tensor | None = None
        # Of the step's samples, domain by domain, where they were flagged.
        self.flags: list[Tensor] = []
        self.warned: set[int] = set()
        # What the last statistics were; repeated until the next, so that every record has some.
        self.diagnostics: dict[str, float] = {}
        # The directions on the channels that live, until masks or directions change.
        self.living_directions: dict[str, Tensor] = {}

    # training ---------------------------------------------------------------------------------------------------------

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.step == self.schedule.first_step(self.total_steps):
            self.reference.load_state_dict(self.network.state_dict())
        metrics = super().update(minibatches, unlabeled)
        return {**metrics, **self.diagnostics}

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        since = self.step - self.schedule.first_step(self.total_steps)
        if since < 0:
            return super().compute_loss(minibatches)
        due = (
            since % self.hparams["statistics_every"] == 0
            or self.hparams["removal"] == "soft"
            or (self.is_pretrained and since <= self._refresh_every() and bool(self.layers))
        )
        if not due and self.hparams["risk_weight"] == 1 and not self.flags_every_step:
            return super().compute_loss(minibatches)
        self.flags = flags = self._flag(minibatches)
        if not due:
            return self._weighted_loss(minibatches, flags)
        with _Capture(self) as self.captured:
            loss, metrics = self._weighted_loss(minibatches, flags)
        if since > self._refresh_every():  # before, none have been looked for
            for name in self.layers:
                layer = name.removeprefix("featurizer.").removesuffix(".weight")
                self.diagnostics[f"directions_{layer}"] = float(self._rank(name))
        penalty = self._take_statistics(minibatches, flags, self.captured.inputs)
        if self.hparams["removal"] == "soft":
            self.diagnostics["projection_penalty"] = penalty.item()
        return loss + penalty, metrics

    def after_backward(self) -> None:
        if self.channel_score == "taylor":
            self._take_taylor()
        elif self.channel_score == "unflagged":
            self._take_unflagged()
        self.captured = self.unflagged = None

    def before_masks(self) -> None:
        if self.step == self.schedule.last_step(self.total_steps):
            self._check_contrast()  # where nothing is pruned, nobody else asks
        if self._directions_are_due():
            self._renew_directions()
        self._remove_directions()

    def score(self, minibatches: Minibatches) -> scores.Scores:
        self._check_contrast()
        if self.channel_score in ("taylor", "unflagged"):
            return {g.name: getattr(self, f"{self.channel_score} {_key(g.name)}").clone() for g in self.groups}
        return {group.name: -self._moments(group.readers[-1]).spuriousness() for group in self.groups}

    def _renew_masks(self, minibatches: Minibatches) -> None:
        super()._renew_masks(minibatches)
        self.living_directions = {}

    def _check_contrast(self) -> None:
        if self._needs_contrast() and not self._has_contrast().any():
            raise UserError(
                f"SFP finds no contrast in any domain: the share of flagged samples is outside [{CONTRAST[0]}, "
                f"{CONTRAST[1]}] everywhere (flag_policy {self.hparams['flag_policy']!r}, flag_kappa "
                f"{self.hparams['flag_kappa']}); train longer before pruning (prune_start) or change flag_kappa"
            )

    def _needs_contrast(self) -> bool:
        """Whether anything that SFP does depends on its flags: without it is Taylor."""
        return self.hparams["removal"] != "none" or self.hparams["risk_weight"] != 1 or self.channel_score != "taylor"

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "diagnostics": dict(self.diagnostics)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.diagnostics = dict(state.get("diagnostics", {}))
        self.living_directions = {}

    def _weighted_loss(self, minibatches: Minibatches, flags: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The objective; with risk weights, cross-entropy in which unflagged samples weigh `risk_weight` times more. A
        domain without contrast has no unflagged samples to speak of: all of its samples weigh the same."""
        if self.hparams["risk_weight"] == 1:
            return super().compute_loss(minibatches)
        x, y = torch.cat([x for x, _ in minibatches]), torch.cat([y for _, y in minibatches])
        light = torch.cat([flagged | ~use for flagged, use in zip(flags, self._has_contrast())])
        weights = torch.where(light, 1.0, self.hparams["risk_weight"])
        losses = F.cross_entropy(self.predict(x), y, reduction="none")
        loss = (weights * losses).sum() / weights.sum()
        return loss, {"loss": loss.item()}

    # flags ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _flag(self, minibatches: Minibatches) -> list[Tensor]:
        """Bool [N] per domain: which samples seem to rest on a spurious attribute."""
        self.reference.eval()
        self.diagnostics = {name: value for name, value in self.diagnostics.items() if not name.startswith("flag")}
        logits = self.reference_logits(torch.cat([x for x, _ in minibatches]))
        flags = []
        for domain, (part, batch) in enumerate(zip(logits.split([len(y) for _, y in minibatches]), minibatches)):
            losses = F.cross_entropy(part, batch[1], reduction="none")
            members = F.one_hot(batch[1], self.loss_sums.shape[1]).to(losses.dtype)
            self._follow(self.loss_sums[domain], losses @ members)
            self._follow(self.loss_counts[domain], members.sum(0))
            thresholds = self._thresholds(domain)[batch[1]]
            flagged = losses < thresholds
            truth: Tensor | None = getattr(batch, "aligned", None)
            if self.hparams["flag_policy"] == "random":
                order = torch.randperm(len(flagged)).to(flagged.device)
                flagged = flagged[order]
            elif self.hparams["flag_policy"] == "oracle":
                if truth is None:
                    raise UserError("flag_policy 'oracle' needs a data set that knows its aligned samples")
                flagged = truth.to(flagged.device)
            self._follow(self.flag_counts[domain], flagged.to(losses.dtype) @ members)
            flags.append(flagged)
            self.diagnostics[f"flagged_domain{domain}"] = flagged.float().mean().item()
            self.diagnostics[f"flag_threshold_domain{domain}"] = thresholds.mean().item()
            if truth is not None:
                hits = (flagged & truth.to(flagged.device)).sum().item()
                if flagged.any():
                    self.diagnostics[f"flag_precision_domain{domain}"] = hits / flagged.sum().item()
                if truth.any():
                    self.diagnostics[f"flag_recall_domain{domain}"] = hits / truth.sum().item()
        return flags

    def reference_logits(self, x: Tensor) -> Tensor:
        """Logits [N, K] of the frozen copy."""
        return self.reference(x)

    def _thresholds(self, domain: int) -> Tensor:
        """[K]: below which loss a sample of the domain and class is flagged, kappa times the mean loss of the domain
        (or of the class in it; a class not seen yet has the domain's)."""
        sums, counts = self.loss_sums[domain], self.loss_counts[domain]
        means = (sums.sum() / counts.sum()).expand_as(sums)
        if self.hparams["flag_threshold"] == "class":
            means = torch.where(counts > 0, sums / counts.clamp_min(1e-12), means)
        return self.hparams["flag_kappa"] * means

    def _has_contrast(self) -> Tensor:
        """Bool [D]: whether a domain has both flagged and unflagged samples, by its share of flagged ones of late."""
        shares = self.flag_counts.sum(1) / self.loss_counts.sum(1)  # of nothing: nan, which is in no range
        return (shares >= CONTRAST[0]) & (shares <= CONTRAST[1])

    @staticmethod
    def _follow(total: Tensor, latest: Tensor) -> None:
        total.mul_(DECAY).add_(latest)

    def _take_statistics(self, minibatches: Minibatches, flags: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """Updates the moments from what the layers have just seen; returns the soft penalty (0 unless asked for)."""
        useful = self._has_contrast().tolist()
        for domain in range(len(flags)):
            if not useful[domain] and domain not in self.warned:
                self.warned.add(domain)
                share = float(self.flag_counts[domain].sum() / self.loss_counts[domain].sum())
                warnings.warn(
                    f"SFP, step {self.step}: {share:.0%} of the samples of training domain {domain} are flagged, which "
                    "gives no contrast; statistics leave it out wherever that is so (told once)",
                    stacklevel=2,
                )
        penalty = self.loss_sums.new_zeros(())
        if not any(useful):
            return penalty
        kept = torch.cat([torch.full_like(flagged, use) for flagged, use in zip(flags, useful)])
        self.unflagged = kept & ~torch.cat(flags)
        labels, flagged = torch.cat([y for _, y in minibatches])[kept], torch.cat(flags)[kept]
        for name, x in inputs.items():
            if _key(name) not in self.moments and name not in self.layers:
                continue  # one of several readers of a group, captured for its sensitivity alone
            known = self.moments if _key(name) in self.moments else self.layer_moments
            channels = self._moments(name, known).sums.shape[2]
            x = _by_image(x, self._layer(name), len(kept))
            vectors = _channel_means(x.detach().float()[kept], self._layer(name), channels)
            if known is self.moments:
                self._moments(name).update(vectors, labels, flagged)
            if name in self.layers:
                relative = self.removal_vectors == "relative"
                directed = F.normalize(vectors, dim=1) if relative else vectors
                self._moments(name, self.layer_moments).update(directed, labels, flagged)
                if self.hparams["removal"] == "soft" and flagged.any():
                    penalty = penalty + self._projection(name, x[kept][flagged])
        return self.hparams["removal_strength"] * penalty

    # directions -------------------------------------------------------------------------------------------------------

    def _directions_are_due(self) -> bool:
        since = self.step - self.schedule.first_step(self.total_steps)
        if not self.layers or since <= 0 or since % self._refresh_every() or not self._has_contrast().any():
            return False
        return not self.is_pretrained or not any(self._rank(name) for name in self.layers)

    def _refresh_every(self) -> int:
        """Steps between two renewals of the directions."""
        return max(1, round(self.hparams["refresh"] * self.total_steps))

    @torch.no_grad()
    def _renew_directions(self) -> None:
        self.living_directions = {}
        for name in self.layers:
            found = spurious_directions(
                self._moments(name, self.layer_moments),
                self.hparams["removal_rank"],
                self.hparams["removal_energy"],
                self.hparams["removal_spares"] == "class_means",
            )
            stored = getattr(self, _directions(name))
            stored.zero_()
            stored[: len(found)] = found

    @torch.no_grad()
    def _remove_directions(self) -> None:
        if self.hparams["removal"] != "hard":
            return
        for name in self.layers:
            if name not in self.living_directions:
                self.living_directions[name] = self._living_directions(name)
            if len(living := self.living_directions[name]):
                weight = self._layer(name).weight
                weight.copy_(remove_directions(weight, living))

    def _living_directions(self, name: str) -> Tensor:
        """Orthonormal [k, C]: the directions as far as they lie on inputs that live.

        With dead inputs in them, zeroing those after the removal would bring part of a direction back.
        """
        directions = getattr(self, _directions(name))[: self._rank(name)]
        if name in self.weight_masks.names:
            directions = directions * self.weight_masks[name].transpose(0, 1).flatten(1).any(1)
        _, sizes, living = torch.linalg.svd(directions, full_matrices=False)
        return living[sizes > LIVING]

    def _rank(self, name: str) -> int:
        return int(getattr(self, _directions(name)).any(1).sum())

    def _projection(self, name: str, x: Tensor) -> Tensor:
        """mean ||W * (P P^T x)||^2 / mean ||x||^2 over the flagged samples and positions, where || || is over channels:
        what the layer makes of that part."""
        layer, rank = self._layer(name), self._rank(name)
        if not rank:
            return x.new_zeros(())
        directions = getattr(self, _directions(name))[:rank]
        x = x.detach().float()  # inner layers have bf16 inputs under autocast
        if isinstance(layer, nn.Linear):
            out = F.linear(x @ directions.t() @ directions, layer.weight)
            return out.square().sum(-1).mean() / x.square().sum(-1).mean().clamp_min(1e-12)
        part = torch.einsum("kc,kd,ndhw->nchw", directions, directions, x)
        out = type(layer).forward(layer, part)  # with the layer's own padding, and without its hooks
        if layer.bias is not None:
            out = out - layer.bias.view(-1, 1, 1)
        return out.square().sum(1).mean() / x.square().sum(1).mean().clamp_min(1e-12)

    # the network ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take_taylor(self) -> None:
        for name, value in scores.channel_taylor(self.groups, dict(self.named_parameters())).items():
            getattr(self, f"taylor {_key(name)}").lerp_(value, 1 - GRADIENT_MOMENTUM)

    @torch.no_grad()
    def _take_unflagged(self) -> None:
        if self.captured is None or self.unflagged is None or not self.unflagged.any():
            return
        for group in self.groups:
            images = len(self.unflagged)
            parts = [self.captured.sensitivity(name, group.channels, images) for name in group.readers]
            latest = torch.stack(parts).sum(0)
            mean = latest[self.unflagged].square().mean(0)
            getattr(self, f"unflagged {_key(group.name)}").lerp_(mean, 1 - GRADIENT_MOMENTUM)

    def _mixing_layers(self) -> list[str]:
        """The weights of full convolutions and linear layers, by parameter name, in the order of the network; without
        linear layers that read a flattened map, whose inputs are no channels."""
        flattened = {name for g in self.groups for name in g.readers if g.channels != self._layer(name).weight.shape[1]}
        names = [
            f"featurizer.{name}.weight"
            for name, layer in self.featurizer.named_modules()
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        ]
        return [name for name in names if name not in flattened]

    def _regularised_layers(self) -> list[str]:
        if self.hparams["removal"] == "none":
            return []
        names = self._mixing_layers()
        which = self.hparams["removal_layers"]
        if which == "auto":
            which = "last" if self.is_pretrained else "first"
        count = {"first": 1, "all": len(names), "last": max(1, round(LAST_PART * len(names)))}[which]
        names = names[-count:] if which == "last" else names[:count]
        for name in names:
            if not uses_weight_as_is(self._layer(name)):
                kind = type(self._layer(name)).__name__
                raise UserError(
                    f"SFP cannot take directions out of layer {name!r}: {kind} transforms its weight before it uses "
                    "it; set hparam 'removal' to none, or choose another backbone"
                )
        return names

    def _layer(self, name: str) -> Any:
        return self.get_submodule(name.removesuffix(".weight"))

    def _moments(self, name: str, among: nn.ModuleDict | None = None) -> ConditionalMoments:
        moments = (self.moments if among is None else among)[_key(name)]
        assert isinstance(moments, ConditionalMoments)
        return moments

    def _check_hparams(self) -> None:
        for name, valid in (
            ("flag_policy", FLAG_POLICIES),
            ("flag_threshold", FLAG_THRESHOLDS),
            ("removal", REMOVALS),
            ("removal_spares", REMOVAL_SPARES),
            ("removal_vectors", REMOVAL_VECTORS),
            ("removal_layers", REMOVAL_LAYERS),
            ("channel_score", CHANNEL_SCORES),
        ):
            if self.hparams[name] not in valid:
                raise unknown_name(f"{name} of SFP", self.hparams[name], valid)
        if self.granularity != "channel":
            raise UserError("SFP prunes channels: hparam 'granularity' must be 'channel'")
        if self.hparams["objective"] == "Mixup":
            raise UserError("SFP compares samples, and objective 'Mixup' mixes them; choose another objective")
        if self.hparams["risk_weight"] != 1 and self.hparams["objective"] != "ERM":
            raise UserError(
                f"hparam 'risk_weight' weighs the samples of ERM's risk; objective "
                f"{self.hparams['objective']!r} has none"
            )


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
)
class SFPWeighted(SFP):
    """SFP whose unflagged samples weigh more in the risk, which weakens the flagged samples' share in the model.

    A reconstruction too; close to LfF and JTT, and therefore named in every row that uses it.
    """


class _Capture(AbstractContextManager["_Capture"]):
    """Collects, while it lasts, the inputs of the layers whose statistics are kept; with the score `unflagged` also, in
    the backward pass that follows, how the loss answers to them."""

    def __init__(self, algorithm: SFP) -> None:
        readers = [name for group in algorithm.groups for name in group.readers]
        self.sensitive = set(readers) if algorithm.channel_score == "unflagged" else set()
        names = dict.fromkeys([*(group.readers[-1] for group in algorithm.groups), *algorithm.layers, *self.sensitive])
        self.layers: dict[str, nn.Module] = {name: algorithm._layer(name) for name in names}
        self.inputs: dict[str, Tensor] = {}
        # By layer, for each of its calls: [N, D], the loss's derivative by a gate on each of D parts of the input.
        self.derivatives: dict[str, list[Tensor | None]] = {name: [] for name in self.sensitive}
        self.handles: list[Any] = []

    def __enter__(self) -> _Capture:
        for name, layer in self.layers.items():
            self.handles.append(layer.register_forward_pre_hook(self._note(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def sensitivity(self, name: str, channels: int, images: int) -> Tensor:
        """After the backward pass: [images, channels], each sample's derivative of the loss by a gate z = 1 on what
        layer `name` reads of a channel, which is the sum of x dL/dx over all that it reads of it."""
        calls = torch.cat([call for call in self.derivatives[name] if call is not None])
        return calls.unflatten(0, (images, -1)).sum(1).unflatten(1, (channels, -1)).sum(2)

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = inputs[0]
            # Objectives that run the network domain by domain come here once for each, in the domains' order.
            earlier = self.inputs.get(name)
            self.inputs[name] = x if earlier is None else torch.cat([earlier, x])
            if name not in self.sensitive or not x.requires_grad:
                return None
            own = x.view_as(x)  # others may read x too, and the gradient of x would be that of all of them
            own.register_hook(self._differentiate(name, x.detach()))
            return (own, *inputs[1:])

        return note

    def _differentiate(self, name: str, x: Tensor) -> Callable[[Tensor], None]:
        calls = self.derivatives[name]
        place = len(calls)
        calls.append(None)
        # Channels come second where a convolution reads, and last where a linear layer does.
        positions = tuple(range(2, x.dim()) if isinstance(self.layers[name], nn.Conv2d) else range(1, x.dim() - 1))

        def differentiate(gradient: Tensor) -> None:
            product = gradient.float() * x.float()
            calls[place] = product.sum(positions) if positions else product

        return differentiate


def _by_image(x: Tensor, layer: nn.Module, images: int) -> Tensor:
    """What `layer` reads, with one row an image: windows that an image was cut into are put side by side."""
    if len(x) == images:
        return x
    if isinstance(layer, nn.Conv2d):
        return x.unflatten(0, (images, -1)).transpose(1, 2).flatten(2, 3)
    return x.reshape(images, -1, x.shape[-1])


def _channel_means(x: Tensor, layer: nn.Module, channels: int) -> Tensor:
    """What `layer` reads, averaged over positions: [N, channels] of [N, C, H, W], or of [N, ..., C] where it is linear.

    A flattened map holds several numbers of each channel, channel by channel.
    """
    if isinstance(layer, nn.Conv2d):
        return x.mean((2, 3))
    vectors = x.flatten(1, -2).mean(1) if x.dim() > 2 else x
    return vectors.unflatten(1, (channels, -1)).mean(2)


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch forbids dots in the names of modules and buffers


def _directions(name: str) -> str:
    return f"directions {_key(name)}"
