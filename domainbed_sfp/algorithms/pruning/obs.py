"""Optimal brain surgeon for channels (Hassibi & Stork 1993, NIPS 5, "Second order derivatives for network pruning"),
layer by layer as in OBC (Frantar & Alistarh 2022, arXiv 2208.11580) and ZipLM (Kurtic, Frantar & Alistarh 2023, arXiv
2302.04089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import PRUNING_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.pruning.masks import removed_units
from domainbed_sfp.pruning.reconstruction import by_channel, with_ridge


@register(
    "OBS",
    family="pruning",
    reference="Hassibi & Stork 1993; channels as in Kurtic et al. 2023, arXiv 2302.04089",
    hparams={name: hparam for name, hparam in PRUNING_HPARAMS.items() if name not in ("granularity", "reconstruction")},
    retired={"granularity": "channel", "reconstruction": "least_squares"},
)
class OBS(ScheduledPruning):
    """Removes the channels whose loss the others can make up for best, and lets them.

    What a layer makes of the channels h that it reads changes by the removal of channel j, once the others have taken
    over as well as they can, by |W_j|^2 / [H^-1]_jj, where H = E[h h^T] (ZipLM, equation 2, with one column a channel).
    One by one the channel of least error goes, and H^-1 and W are brought up to date, so that what depends on each
    other is not removed together. H is an average over training (`pruning.reconstruction`) and counts a constant, which
    goes into the bias. Errors are shares of the layer's output energy E|W h|^2, and those of several readers add up;
    `pruning_scope` "global" compares them between layers. The papers prune a trained network at once or in a few
    stages, here it is the cubic ramp, as for every method.
    """

    reconstructs = True

    def score(self, minibatches: Minibatches) -> scores.Scores:
        return {group.name: self._removal_errors(group) for group in self.groups}

    def _removal_errors(self, group: ChannelGroup) -> Tensor:
        alive = self.unit_masks[group.name]
        sparsity = self.schedule.at(self.step, self.total_steps)
        most = removed_units(group.channels, sparsity) if self.ranking_scope() == "layer" else group.channels - 1
        readers = []
        for name in group.readers:
            constant = self.reconstruction.shifts(self, name) is not None
            weight = by_channel(self.get_parameter(name), group.channels).transpose(1, 2).flatten(0, 1)
            readers.append((weight[:, alive], with_ridge(self.reconstruction.moments[name], alive, constant)))
        errors = torch.full((group.channels,), torch.inf, dtype=torch.float64, device=alive.device)
        errors[alive] = removal_errors(readers, most - int((~alive).sum()))
        return errors


@torch.no_grad()
def removal_errors(readers: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """By how much of its output energy what the readers make of channels has changed when a channel goes, as the
    largest such change up to then; for the first `count` channels that go, infinite for others: [C], float64.

    Args:
        readers: of each, its weights [out, C] and H [C, C], or [C + 1, C + 1] with a constant as the last input, which
            stays; positive definite.
    """
    channels = readers[0][0].shape[1]
    states = []
    for weight, moments in readers:
        # Of the constant nothing is read yet.
        weight = torch.cat([weight.double(), weight.new_zeros(len(weight), len(moments) - channels).double()], 1)
        energy = torch.einsum("oc,cd,od->", weight, moments, weight).clamp_min(1e-30)
        states.append((weight / energy.sqrt(), torch.linalg.inv(moments)))
    errors = torch.full((channels,), torch.inf, dtype=torch.float64, device=readers[0][0].device)
    alive, largest = torch.ones_like(errors, dtype=torch.bool), 0.0
    for _ in range(count):
        error = sum(weight.square().sum(0)[:channels] / inverse.diagonal()[:channels] for weight, inverse in states)
        assert isinstance(error, Tensor)
        gone = int(error.masked_fill(~alive, torch.inf).argmin())
        largest = max(largest, float(error[gone]))
        errors[gone], alive[gone] = largest, False
        for weight, inverse in states:
            row = inverse[gone] / inverse[gone, gone]
            weight.addr_(weight[:, gone].clone(), row, alpha=-1)
            inverse.addr_(inverse[:, gone].clone(), row, alpha=-1)
            weight[:, gone] = 0
            # Nothing of it is left, and nothing is to be divided by.
            inverse[gone] = inverse[:, gone] = 0
            inverse[gone, gone] = 1
    return errors
