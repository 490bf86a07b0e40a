"""GlobalPru, global channel attention pruning (Wang, PolyU thesis 2024, ch. 3; Neural Networks 171:104-113, 2024,
doi 10.1016/j.neunet.2023.11.065). This project's reconstruction: the papers' method section is not available to us.

What the paper states: each sample's channel attention is a local ranking of channels, and majority voting gives one
global ranking; during sparse training a learn-to-rank regularization pushes every sample's attention to the global
ranking, the prior; then one static pruning fits all samples. It claims 54.0 % fewer FLOPs for a ResNet-50 on ImageNet
at 0.2 points less accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import NOT_NEGATIVE, RUN_FRACTION, Hparam, Range, one_of
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.attention import (
    gate_logits,
    gate_of,
    insert_gates,
    inside_blocks,
)
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups
from domainbed_sfp.pruning.masks import removed_units
from domainbed_sfp.pruning.ranking import RankingVote, ballots, kendall_tau, list_mle, top_k_overlap
from domainbed_sfp.pruning.reconstruction import RECONSTRUCTION
from domainbed_sfp.pruning.schedules import SCHEDULE_HPARAMS, StairSchedule
from domainbed_sfp.pruning.state import attribute_name

# Fraction of the run at which the vote closes: by then gates behind a pretrained network have learned something.
VOTE_AT = 0.2
# Fraction of the run over whose minibatches the vote is taken: 3,200 samples an environment of DomainBed's protocol.
VOTE_WINDOW = 0.02
# Prunings from `prune_start` to `prune_end`: thirds, between which the network recovers.
PRUNE_ROUNDS = 3
# Channels per hidden unit of a gate, as in squeeze-and-excitation networks (arXiv 1709.01507).
GATE_REDUCTION = 16
# mu, weight of the mean attention: small beside the loss, it only keeps attention from growing without bound.
GATE_PENALTY = 1e-4
# Fraction of the run between two measurements of agreement, and of each environment, as many samples as it takes.
AGREEMENT_EVERY = 0.01
AGREEMENT_SAMPLES = 16


@register(
    "GlobalPru",
    family="pruning",
    reference="Wang 2024 (PolyU thesis, ch. 3); doi 10.1016/j.neunet.2023.11.065",
    standing="reconstruction",
    hparams={
        "sparsity": SCHEDULE_HPARAMS["sparsity"],
        "objective": UNIT_HPARAMS["objective"],
        "prune_start": Hparam(
            0.6, doc="fraction of the run at which the first channels go",
            valid=Range(f"a fraction of the run in [{VOTE_AT}, 1]: the vote comes first", lambda v: VOTE_AT <= v <= 1),
        ),
        "prune_end": Hparam(0.8, doc="fraction of the run at which the last channels go", valid=RUN_FRACTION),
        "gated_layers": Hparam(
            "blocks", doc="blocks: channels inside blocks; all: whatever structured pruning may remove, as others do",
            valid=one_of("blocks", "all"),
        ),
        "pruning_scope": replace(UNIT_HPARAMS["pruning_scope"], earlier="layer"),
        "vote_by": Hparam(
            "saliency", doc="what a sample ranks channels by: saliency, |a dL/da| with its loss L; attention, a itself",
            valid=one_of("saliency", "attention"), earlier="attention",
        ),
        "rank_weight": Hparam(
            0.1, lambda r: 10 ** r.uniform(-2, 0), "lambda, weight of the rank loss; 0: without it", valid=NOT_NEGATIVE
        ),
        "reconstruction": RECONSTRUCTION,
    },
    retired={
        "granularity": "channel",
        "prune_rounds": PRUNE_ROUNDS,
        "gate_reduction": GATE_REDUCTION,
        "vote_at": VOTE_AT,
        "vote_window": VOTE_WINDOW,
        "voting": "majority",
        "rank_loss": "listmle",
        "gate_penalty": GATE_PENALTY,
        "agreement_every": AGREEMENT_EVERY,
    },
)  # fmt: skip
class GlobalPru(ScheduledPruning):
    """Global channel attention pruning, reconstructed.

    A squeeze-and-excitation gate a = 2 sigmoid(u) stands behind the convolutions inside blocks whose channels may be
    removed, after the normalization (`pruning.attention`); a pretrained network's logits are what they were.
    A network without blocks, as MNIST_CNN, has gates behind all its convolutions, and `gated_layers` "all" puts them
    wherever the other methods may remove channels: stem and head as well.

    Of K steps:
    1. Until .2 K the objective alone.
    2. The vote. During the last 2 % of the run in that stage (one step at least) the samples of every minibatch, before
       the step's update and in evaluation mode, vote on each layer's channels by their saliency: each names its best
       (1 - p) C. A channel's saliency |a dL/da| is what its attention is worth to the sample: what its loss would
       change by without the channel, to first order. (The paper speaks of "sample-specific saliencies" and gives no
       formula. By attention alone, `vote_by`, gates that have hardly left 1 rank no better than chance.) With
       `pruning_scope` global each sample names the best (1 - p) of all channels, and layers lose what they have fewest
       votes for. Environments weigh alike however many samples they have; ties go by mean attention. Then the ranking
       is fixed, for good. Training images are what votes, as augmented for training; over 2 % of 5,001 steps at batch
       size 32 they are 3,200 of each environment.
    3. From the vote to the last pruning: objective + lambda * mean over layers of rank loss + mu * mean over layers of
       mean |a|. The rank loss is ListMLE over what equal scores cost (`pruning.ranking`); lambda rises linearly from 0
       at the vote to its value half-way to `prune_start`. Both terms are about channels that are alive.
    4. At .6, .7 and .8 K the lowest-ranked third of the fraction p of each layer, or of all, goes. A mask is zero
       weights: of the filter, of the normalization, of what reads the channel, and of its gate's column and row. Behind
       BatchNorm that is the network without the channel. GroupNorm counts dead channels in its groups' statistics.
    5. Then the objective alone.

    With `rank_weight` 0 it is the ablation without the rank loss: gates, vote and pruning stay.

    Gates are part of the deployed network: parameters and MACs count those of the surviving channels' gates, and those
    of the dense network count the dense gates. The exported file keeps them, since a trained gate depends on the input;
    one that does not (`channel_gates.fold_constant_gates`) goes into the weights before it. The gates of channels that
    are gone have no weight left, and go with them.

    Logged from the vote to the first pruning, every 1 % of the run: `rank_tau_env{i}` and `rank_overlap_env{i}`, by
    training environment (in the order of minibatches): Kendall's tau between samples' own rankings and the global one,
    and the share of its best (1 - p) C channels that are among the sample's own, in evaluation mode, means over samples
    and layers. The first is from before the rank loss sets in, the last from when it has done what it will do before
    channels go.
    """

    schedule: StairSchedule

    spares_best = True

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.votes = nn.ModuleDict(
            {attribute_name(group.name): RankingVote(num_domains, group.channels) for group in self.groups}
        )

    def make_schedule(self) -> StairSchedule:
        values = self.hparams
        return StairSchedule(values["sparsity"], PRUNE_ROUNDS, values["prune_start"], values["prune_end"])

    def change_network(self) -> None:
        groups = channel_groups(self.featurizer, self.classifier)
        if self.hparams["gated_layers"] == "blocks":
            groups = inside_blocks(self.featurizer, groups)
        self.gated_groups = insert_gates(self.featurizer, self.classifier, groups, GATE_REDUCTION)

    def removable_channels(self) -> list[ChannelGroup]:
        return self.gated_groups

    # training ---------------------------------------------------------------------------------------------------------

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        closes = self.vote_step()
        if self.step == 0 and self.schedule.first_step(self.total_steps) < 1 and self.hparams["sparsity"] > 0:
            raise UserError(
                f"GlobalPru prunes by a vote of trained gates, and hparam 'prune_start' {self.hparams['prune_start']} "
                f"of {self.total_steps} steps is before anything is trained; raise it or train for more steps"
            )
        # At step 0 all gates are alike still.
        if max(0, closes - _span(VOTE_WINDOW, self.total_steps)) < self.step <= closes:
            self._collect_votes(minibatches)
        if self.step == closes:
            for group in self.groups:
                self.vote(group.name).close()
        agreement = self._agreement(minibatches) if self._agreement_is_due() else {}
        return {**super().update(minibatches, unlabeled), **agreement}

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        if not self.vote_step() <= self.step <= self.schedule.last_step(self.total_steps):
            return super().compute_loss(minibatches)
        with gate_logits(self._gates()) as logits:
            loss, metrics = super().compute_loss(minibatches)
        rank_loss, attention = self._rank_loss(logits), self._mean_attention(logits)
        if weight := self.rank_weight():
            loss = loss + weight * rank_loss
        loss = loss + GATE_PENALTY * attention
        return loss, {**metrics, "rank_loss": rank_loss.item(), "mean_attention": attention.item()}

    def score(self, minibatches: Minibatches) -> scores.Scores:
        # The best channel has place 0, the worst C - 1.
        places = {group.name: self.vote(group.name).ranking.argsort() for group in self.groups}
        if self.ranking_scope() == "layer":
            return {name: -place.float() for name, place in places.items()}
        # Of equal shares, the higher place: shares are rounded to nine digits, and places weigh less than that.
        return {name: self.vote(name).shares() - 1e-10 * place / len(place) for name, place in places.items()}

    def vote_step(self) -> int:
        """The step at which the vote closes, before its update; before the first all gates are alike, and nobody could
        vote."""
        closes = max(1, round(VOTE_AT * self.total_steps))
        return min(closes, self.schedule.first_step(self.total_steps))

    def rank_weight(self) -> float:
        """lambda at this step."""
        begin, end = self.vote_step(), self.schedule.first_step(self.total_steps)
        return self.hparams["rank_weight"] * min(1.0, (self.step - begin) / max(1.0, (end - begin) / 2))

    def vote(self, group: str) -> RankingVote:
        """The vote on the channels of a group, its outcome `ranking` among it."""
        vote = self.votes[attribute_name(group)]
        assert isinstance(vote, RankingVote)
        return vote

    def _rank_loss(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Mean over layers of the rank loss of the channels alive, which are the first of the ranking."""
        with torch.set_grad_enabled(self.rank_weight() > 0):
            return torch.stack([list_mle(u, self._alive_ranking(name)) for name, u in logits.items()]).mean()

    def _mean_attention(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Mean over layers of the mean |a| of the channels alive."""
        alive = {name: u[:, self.unit_masks[name]] for name, u in logits.items()}
        return torch.stack([2 * torch.sigmoid(u).mean() for u in alive.values()]).mean()

    def _alive_ranking(self, group: str) -> Tensor:
        ranking = self.vote(group).ranking
        return ranking[self.unit_masks[group][ranking]]

    # votes and agreement ----------------------------------------------------------------------------------------------

    def _collect_votes(self, minibatches: Minibatches) -> None:
        for environment, (x, y) in enumerate(minibatches):
            if self.hparams["vote_by"] == "attention":
                logits = merits = self._attention_logits(x)
            else:
                logits, merits = self._saliencies(x, y)
            for name, given in self._ballots(merits).items():
                self.vote(name).count(environment, given, logits[name])

    def _ballots(self, merits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every sample votes for, [N, C] by group name: its best channels of each layer, or of all."""
        if self.ranking_scope() == "layer":
            return {name: ballots(merit, self._kept(merit.shape[1])) for name, merit in merits.items()}
        joined = torch.cat(list(merits.values()), 1)
        given = ballots(joined, self._kept(joined.shape[1]))
        return dict(zip(merits, given.split([merit.shape[1] for merit in merits.values()], 1)))

    def _saliencies(self, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(logits u, |a dL/da|) of the gates a = 2 sigmoid(u), [N, C] each by group name, where L is each sample's
        cross-entropy; in evaluation mode."""
        with self._evaluating(), torch.enable_grad(), gate_logits(self._gates()) as logits:
            loss = F.cross_entropy(self.network(x), y, reduction="sum")
        of_logits = torch.autograd.grad(loss, list(logits.values()))
        # da/du = a (1 - sigmoid(u)).
        return (
            {name: u.detach() for name, u in logits.items()},
            {name: (g / torch.sigmoid(-u.detach())).abs() for (name, u), g in zip(logits.items(), of_logits)},
        )

    def _agreement_is_due(self) -> bool:
        begin, end = self.vote_step(), self.schedule.first_step(self.total_steps)
        if not begin <= self.step <= end:
            return False
        return self.step == end or (self.step - begin) % _span(AGREEMENT_EVERY, self.total_steps) == 0

    def _agreement(self, minibatches: Minibatches) -> dict[str, float]:
        values = {}
        for environment, (x, _) in enumerate(minibatches):
            logits = self._attention_logits(x[:AGREEMENT_SAMPLES])
            taus, overlaps = [], []
            for name, u in logits.items():
                ranking = self.vote(name).ranking
                overlaps.append(top_k_overlap(u, ranking, self._kept(len(ranking))).mean())
                if len(ranking) > 1:
                    taus.append(kendall_tau(u, ranking).mean())
            if taus:
                values[f"rank_tau_env{environment}"] = torch.stack(taus).mean().item()
            values[f"rank_overlap_env{environment}"] = torch.stack(overlaps).mean().item()
        return values

    @torch.no_grad()
    def _attention_logits(self, x: Tensor) -> dict[str, Tensor]:
        """The gates' logits [N, C] on images [N, C, H, W], by group name, in evaluation mode."""
        with self._evaluating(), gate_logits(self._gates()) as logits:
            self.featurizer(x)
        return logits

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    def _gates(self) -> dict[str, nn.Module]:
        return {group.name: self.get_submodule(gate_of(group)) for group in self.groups}

    def _kept(self, channels: int) -> int:
        return channels - removed_units(channels, self.hparams["sparsity"])


def _span(fraction: float, total_steps: int) -> int:
    """A fraction of the run in steps, at least one."""
    return max(1, round(fraction * total_steps))
