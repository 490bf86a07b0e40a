"""Learning efficient convolutional networks through network slimming (Liu et al. 2017, arXiv 1708.06519)."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import NOT_NEGATIVE, Hparam, one_of
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.schedules import OneShotSchedule

# Fraction of the run that trains with the penalty; the authors fine-tune for as many epochs as they train.
PRUNE_AT = 0.5
NORMALIZATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@register(
    "NetworkSlimming",
    family="pruning",
    reference="Liu et al. 2017, arXiv 1708.06519",
    hparams={
        **{name: hparam for name, hparam in UNIT_HPARAMS.items() if name != "granularity"},
        "pruning_scope": Hparam(
            "global",
            doc="global: one percentile of all scales, as published; layer: one for each",
            valid=one_of("layer", "global"),
        ),
        "slimming_penalty": Hparam(
            1e-4,
            lambda r: r.choice([1e-5, 1e-4, 1e-3]),
            "lambda; 1e-5 on photographs, whose networks are ResNets and the like, as in the authors' code",
            valid=NOT_NEGATIVE,
            photographs=1e-5,
        ),
    },
    retired={"granularity": "channel", "prune_at": PRUNE_AT},
)
class NetworkSlimming(ScheduledPruning):
    """Trains with an L1 penalty on normalization scales, then removes the channels of smallest scale at once.

    The penalty lambda |gamma| (eq. 1) enters as the subgradient lambda sign(gamma), added to the gradient. It ends with
    the pruning, at a global percentile of |gamma|, and what is left is fine-tuned. gamma is the scale of the last
    normalization a channel passes before it is read: BatchNorm's, and GroupNorm's where a network has that. Channels
    that cannot be removed, such as a residual stream's, are not penalised, and every layer keeps its best channel. With
    `prune_residual_streams` (this project's extension) the mean |gamma| of all normalizations of a stream counts.

    The subgradient goes through the optimizer, as published. Under Adam, which is DomainBed's, a small lambda
    disappears beside the gradient of the loss, and a scale, which begins at 1, moves by about the learning rate a step:
    in runs of a few hundred steps channels are ranked mostly by where training has taken their scales. The authors
    train with SGD, for far longer, from scales of 1/2.
    """

    spares_best = True

    def make_schedule(self) -> OneShotSchedule:
        return OneShotSchedule(self.hparams["sparsity"], PRUNE_AT)

    def removable_channels(self) -> list[ChannelGroup]:
        scales = {
            f"featurizer.{name}.weight"
            for name, module in self.featurizer.named_modules()
            if isinstance(module, NORMALIZATIONS)
        }
        groups = []
        self.scales: dict[str, list[str]] = {}  # parameter names by group name
        for group in super().removable_channels():
            own = [name for name in group.vectors if name in scales]
            if own:
                groups.append(group)
                self.scales[group.name] = own if group.is_residual else own[-1:]
        if not groups:
            raise UserError(
                "NetworkSlimming needs normalization layers with scales behind the convolutions, and "
                f"{type(self.featurizer).__name__} has none on a removable channel; choose another backbone"
            )
        return groups

    @torch.no_grad()
    def after_backward(self) -> None:
        if self.step > self.schedule.last_step(self.total_steps):
            return
        parameters = dict(self.named_parameters())
        for name in itertools.chain.from_iterable(self.scales.values()):
            scale = parameters[name]
            penalty = self.hparams["slimming_penalty"] * scale.sign()
            scale.grad = penalty if scale.grad is None else scale.grad + penalty

    def score(self, minibatches: Minibatches) -> scores.Scores:
        parameters = dict(self.named_parameters())
        return {
            group: torch.stack([parameters[name].detach().abs() for name in names]).mean(0)
            for group, names in self.scales.items()
        }
