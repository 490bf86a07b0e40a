"""Base of the methods that prune while they train: a score, on the shared schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches, ObjectiveAlgorithm
from domainbed_sfp.core.errors import UserError, did_you_mean
from domainbed_sfp.core.hparam import Hparam, one_of
from domainbed_sfp.networks.recalibration import recalibrate_batchnorm
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups
from domainbed_sfp.pruning.masks import keep_highest, lower_channels, removed_units
from domainbed_sfp.pruning.reconstruction import RECONSTRUCTION, ReaderInputs, Reconstruction
from domainbed_sfp.pruning.schedules import SCHEDULE_HPARAMS, CubicSchedule, Schedule
from domainbed_sfp.pruning.state import Masks

# What is removed, whatever the schedule.
UNIT_HPARAMS = {
    "sparsity": SCHEDULE_HPARAMS["sparsity"],
    "granularity": Hparam(
        "channel", doc="channel (structured) or weight (unstructured)", valid=one_of("channel", "weight")
    ),
    "pruning_scope": Hparam(
        "layer",
        doc="layer: the same fraction of every layer; global: one ranking of all",
        valid=one_of("layer", "global"),
    ),
    "prune_residual_streams": Hparam(
        False, doc="channel: also those that additions carry from block to block", earlier=False
    ),
    "objective": Hparam("ERM", doc="training objective: ERM, IRM, VREx, GroupDRO, CORAL or Mixup", earlier="ERM"),
}

PRUNING_HPARAMS = {**SCHEDULE_HPARAMS, **UNIT_HPARAMS, "reconstruction": RECONSTRUCTION}
# Of a method that removes channels alone.
CHANNEL_HPARAMS = {name: hparam for name, hparam in PRUNING_HPARAMS.items() if name != "granularity"}

# On a long ramp the mask is renewed this often, not at every step: ranking all weights costs time.
RAMP_UPDATES = 100
# The same with reconstruction: each renewal solves a system of equations for each layer.
RECONSTRUCTED_RAMP_UPDATES = 20


class ScheduledPruning(ObjectiveAlgorithm):
    """Trains with an objective and removes the units of lowest `score` on a cubic ramp.

    Dense until `prune_start`, then sparser up to `prune_end`, then fine-tuned with a fixed mask. A unit once removed
    stays removed. Subclasses say what a unit is worth: by `channel_score` and `weight_score`, or by `score`. The page
    "Write an algorithm" lists what else they may define.
    """

    # What a channel of a group, and a weight, is worth, for a method that is nothing but that (`pruning.scores`).
    channel_score: ClassVar[scores.ChannelScore | None] = None
    weight_score: ClassVar[scores.WeightScore | None] = None

    granularity = "channel"
    # True where masks are renewed before a step's update instead of after it: pruning at initialization.
    prunes_before_update = False
    # True where a ranking across layers leaves every layer its best unit; otherwise a layer wiped out is an error.
    spares_best = False
    # Whether channels that stay take over from those that go, where no hparam `reconstruction` says it.
    reconstructs = False

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.schedule: Schedule = self.make_schedule()
        # Not every method has the hparam.
        self.prunes_streams = bool(self.hparams.get("prune_residual_streams", False))
        if self.prunes_streams and self.granularity != "channel":
            raise UserError("hparam 'prune_residual_streams' is about channels: it needs granularity 'channel'")
        if "reconstruction" in self.hparams:
            self.reconstructs = self.hparams["reconstruction"] != "none"
        if self.reconstructs and self.granularity != "channel":
            raise UserError("hparam 'reconstruction' is about channels: it needs granularity 'channel'")
        # How often masks are renewed on the ramp.
        self.ramp_updates = RECONSTRUCTED_RAMP_UPDATES if self.reconstructs else RAMP_UPDATES
        self.step = 0
        self.groups: list[ChannelGroup] = []
        parameters = dict(self.named_parameters())
        if self.granularity == "channel":
            self.groups = self.removable_channels()
            self.unit_shapes = {group.name: torch.Size([group.channels]) for group in self.groups}
            touched = {name for group in self.groups for name in (*group.filters, *group.vectors, *group.readers)}
        else:
            prunable = scores.prunable_weights(self.featurizer)
            self.unit_shapes = {f"featurizer.{name}": weight.shape for name, weight in prunable.items()}
            touched = set(self.unit_shapes)
        self.weight_masks = Masks({name: value.shape for name, value in parameters.items() if name in touched})
        follows = self.hparams.get("reconstruction_target", "own") == "reference"
        self.reconstruction = Reconstruction(self, self.groups if self.reconstructs else (), follows)
        self._check_removes_something()
        # Which units live, in the method's own granularity; for weights that is what the masks say.
        self.unit_masks = Masks(self.unit_shapes) if self.granularity == "channel" else self.weight_masks

    def _check_removes_something(self) -> None:
        sparsity, removed = self.schedule.sparsity, self.removed_in_the_end()
        if sparsity == 0 or not removed or any(removed.values()):
            return
        what = "network" if self.ranking_scope() == "global" else "largest layer"
        most = max(self._count(names) for names in removed)
        raise UserError(f"pruning {sparsity:.1%} removes nothing: the {what} has {most} units; raise hparam 'sparsity'")

    def removed_in_the_end(self) -> dict[tuple[str, ...], int]:
        """How many units each ranking has removed at final compression, by the names of what it ranks; empty where
        training decides it."""
        if self.hparams.get("mask_rule", "top_k") != "top_k":
            return {}
        every = tuple(self.unit_shapes)
        ranked = [every] if self.ranking_scope() == "global" else [(name,) for name in every]
        return {names: removed_units(self._count(names), self.schedule.sparsity) for names in ranked}

    def _count(self, names: Iterable[str]) -> int:
        return sum(self.unit_shapes[name].numel() for name in names)

    def make_schedule(self) -> Schedule:
        """How many units may live at a step."""
        return CubicSchedule.from_hparams(self.hparams)

    def removable_channels(self) -> list[ChannelGroup]:
        """The groups of channels that may be pruned, for granularity `channel`."""
        groups = channel_groups(self.featurizer, self.classifier, residual_streams=self.prunes_streams)
        if self.prunes_streams and not any(group.is_residual for group in groups):
            network = type(getattr(self.featurizer, "network", self.featurizer)).__name__
            raise UserError(
                f"hparam 'prune_residual_streams': {network} has no residual streams whose channels could be removed; "
                "leave it out or choose another backbone"
            )
        return groups

    def score(self, minibatches: Minibatches) -> scores.Scores:
        """One number per unit, the lowest go first: by parameter name, each of its shape, for granularity `weight`;
        by group name, [channels], for `channel`. By default what `channel_score` and `weight_score` give."""
        parameters = dict(self.named_parameters())
        if self.granularity == "channel" and (channel := type(self).channel_score):
            return scores.by_group(channel, self.groups, parameters)
        if self.granularity == "weight" and (weight := type(self).weight_score):
            return scores.by_weight(weight, {name: parameters[name] for name in self.unit_shapes})
        raise UserError(
            f"{type(self).__name__} has no score for granularity {self.granularity!r}: it defines neither "
            f"{self.granularity}_score nor score(minibatches); with CHANNEL_HPARAMS it offers channels alone"
        )

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.prunes_before_update and self.mask_is_due():
            self.renew_masks(minibatches)
            self.apply_masks()
        with self.reconstruction.watch(self, self.step <= self.schedule.last_step(self.total_steps)) as seen:
            metrics = super().update(minibatches, unlabeled)
        self.take_inputs(seen, minibatches)
        self.before_masks()
        if not self.prunes_before_update and self.mask_is_due():
            self.renew_masks(minibatches)
        self.apply_masks()
        self.step += 1
        return metrics

    def before_masks(self) -> None:
        """Called after the optimizer's step and before masks are renewed and applied; may change weights."""

    def take_inputs(self, seen: ReaderInputs, minibatches: Minibatches) -> None:
        """Called with what the readers of channels have read in a step, where layers are reconstructed."""
        self.reconstruction.take(seen)

    def followed_network(self) -> nn.Module | None:
        """The network whose layers' outputs are to be reconstructed; None: what the layers make themselves."""
        return None

    def prepare_evaluation(self, batches: Iterable[Tensor]) -> None:
        if self.step > self.schedule.first_step(self.total_steps):
            recalibrate_batchnorm(self.network, self.network, batches)

    def masks(self) -> dict[str, Tensor]:
        return self.weight_masks.as_dict()

    def sparsity(self) -> float:
        alive = sum(int(self.unit_masks[name].sum()) for name in self.unit_masks.names)
        return 1 - alive / sum(shape.numel() for shape in self.unit_shapes.values())

    def at_final_compression(self) -> bool:
        return self.step > self.final_step()

    def final_step(self) -> int:
        return self.schedule.last_step(self.total_steps)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def mask_is_due(self) -> bool:
        """Whether masks are renewed in this step; by default some times on the ramp, and where it ends."""
        first, last = (edge(self.total_steps) for edge in (self.schedule.first_step, self.schedule.last_step))
        if not first <= self.step <= last:
            return False
        return self.step == last or (self.step - first) % max(1, (last - first) // self.ramp_updates) == 0

    def apply_masks(self) -> None:
        """Zeroes the weights that masks remove; called after every step's update."""
        if self.step >= self.schedule.first_step(self.total_steps):
            self.weight_masks.zero_dead(dict(self.named_parameters()))

    def choose_alive(self, minibatches: Minibatches, sparsity: float) -> dict[str, Tensor]:
        """Bool masks by unit name that leave out the fraction `sparsity` of lowest score, the dead among them."""
        with torch.enable_grad():
            ranked = self.score(minibatches)
        self._check_scores(ranked)
        # The dead come first in the order of removal, so that none of them returns.
        ranked = {name: score.masked_fill(~self.unit_masks[name], -torch.inf) for name, score in ranked.items()}
        return keep_highest(ranked, sparsity, self.ranking_scope(), self.spares_best)

    def _check_scores(self, found: Mapping[str, Tensor]) -> None:
        whose = f"score() of {type(self).__name__}"
        lacking, strange = self.unit_shapes.keys() - found.keys(), found.keys() - self.unit_shapes.keys()
        if lacking or strange:
            wrong = [f"none for {name!r}" for name in sorted(lacking)[:1]]
            wrong += [f"one for {name!r}{did_you_mean(name, self.unit_shapes)}" for name in sorted(strange)[:1]]
            raise UserError(
                f"{whose} gives {' and '.join(wrong)}; at granularity {self.granularity!r} it has to give a tensor for "
                f"each of {len(self.unit_shapes)} names, such as {next(iter(self.unit_shapes))!r}"
            )
        for name, score in found.items():
            if score.shape != self.unit_shapes[name]:
                expected = tuple(self.unit_shapes[name])
                raise UserError(f"{whose} has shape {tuple(score.shape)} for {name!r}, expected {expected}")
            if bool(score.isnan().any()):
                raise UserError(
                    f"{whose} is not a number for {int(score.isnan().sum())} of {score.numel()} units of {name!r}"
                )

    def ranking_scope(self) -> str:
        """What units are ranked against: "layer" or "global"."""
        return self.hparams.get("pruning_scope", "layer")

    @torch.no_grad()
    def renew_masks(self, minibatches: Minibatches) -> None:
        """Sets `unit_masks` and `weight_masks` to what this step's sparsity leaves; called where `mask_is_due`."""
        sparsity = self.schedule.at(self.step, self.total_steps)
        if sparsity == 0:
            return
        alive = self.choose_alive(minibatches, sparsity)
        self.reconstruction.take_over(self, self.unit_masks, alive, self.followed_network())
        for name, keep in alive.items():
            self.unit_masks.set(name, keep)
        if self.granularity == "channel":
            shapes = {name: self.weight_masks[name].shape for name in self.weight_masks.names}
            device = next(iter(alive.values())).device
            for name, mask in lower_channels(self.groups, alive, shapes, device).items():
                self.weight_masks.set(name, mask)
