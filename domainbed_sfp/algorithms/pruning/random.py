"""Random pruning: the floor of every comparison."""

from __future__ import annotations

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import PRUNING_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.pruning import scores


@register("Random", family="pruning", reference="-", standing="reference", hparams=PRUNING_HPARAMS)
class Random(ScheduledPruning):
    """Removes weights or channels at random."""

    def score(self, minibatches: Minibatches) -> scores.Scores:
        return scores.random_like(self.unit_shapes, minibatches[0][0].device)
