"""Base of the methods that prune once, before training, by what the first batch says of the untrained weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS, ScheduledPruning
from domainbed_sfp.core.hparam import Hparam, one_of
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.schedules import OneShotSchedule

AT_INITIALIZATION_HPARAMS = {
    **UNIT_HPARAMS,
    "pruning_scope": Hparam(
        "auto",
        doc="global, layer, or auto: global for weights, as published, layer for channels",
        valid=one_of("auto", "layer", "global"),
    ),
}


class PruningAtInitialization(ScheduledPruning):
    """Scores every weight on the first minibatches, removes the lowest at once and trains what is left.

    The score is taken from the cross-entropy, as published; the objective trains the network that results. A pretrained
    network is scored as it is: nothing is initialised anew for the scores. The score of a channel is the sum over the
    weights of its filters, which grows with the filter's size: channels are compared within their layer unless
    `pruning_scope` says otherwise. In one ranking of all, every layer keeps its best unit: layers collapse otherwise
    (Tanaka et al. 2020, arXiv 2006.05467). Subclasses define `weight_scores`.
    """

    prunes_before_update = True
    spares_best = True

    def make_schedule(self) -> OneShotSchedule:
        return OneShotSchedule(self.hparams["sparsity"])

    def ranking_scope(self) -> str:
        scope = self.hparams["pruning_scope"]
        if scope != "auto":
            return scope
        return "global" if self.granularity == "weight" else "layer"

    def weight_scores(
        self, network: nn.Module, weights: Mapping[str, Tensor], minibatches: Minibatches
    ) -> scores.Scores:
        """A score for each of `weights`, which are parameters of `network`; the lowest go first."""
        raise TypeError(f"{type(self).__name__} does not define weight_scores(network, weights, minibatches)")

    def channel_scores(self, by_weight: scores.Scores) -> scores.Scores:
        """A score for each channel, by group name, from those of the weights."""
        return scores.channel_sums(self.groups, by_weight)

    def score(self, minibatches: Minibatches) -> scores.Scores:
        # On a copy: BatchNorm's running statistics must not see this batch twice.
        network = copy.deepcopy(self.network)
        weights = {
            f"{part}.{name}": weight
            for part, module in zip(("featurizer", "classifier"), network)
            for name, weight in scores.prunable_weights(module).items()
        }
        by_weight = self.weight_scores(network, weights, minibatches)
        if self.granularity == "channel":
            return self.channel_scores(by_weight)
        return {name: by_weight[name] for name in self.unit_shapes}


def balanced_batch(minibatches: Minibatches, most: int) -> tuple[Tensor, Tensor]:
    """(x, y) with the first samples of every class present, up to `most` of each, taken from the environments in
    turn."""
    x = torch.cat([x for x, _ in minibatches])
    y = torch.cat([y for _, y in minibatches])
    position = torch.cat([torch.arange(len(y), device=y.device) for _, y in minibatches])
    order = position.argsort(stable=True)
    y = y[order]
    of_class = F.one_hot(y)
    rank = (of_class.cumsum(0) * of_class).sum(1)  # the n-th sample of its class, from 1
    chosen = rank <= most
    return x[order[chosen]], y[chosen]
