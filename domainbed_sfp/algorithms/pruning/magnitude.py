"""Magnitude pruning on a ramp (Zhu & Gupta 2017, arXiv 1710.01878)."""

from __future__ import annotations

from domainbed_sfp.algorithms.pruning.scheduled import PRUNING_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.pruning import scores


@register(
    "Magnitude",
    family="pruning",
    reference="Zhu & Gupta 2017, arXiv 1710.01878; channels by L2 norm, Li et al. 2017, arXiv 1608.08710",
    hparams=PRUNING_HPARAMS,
)
class Magnitude(ScheduledPruning):
    """Keeps the weights of largest magnitude, or the channels whose filters have the largest L2 norm."""

    channel_score = staticmethod(scores.channel_magnitude)
    weight_score = staticmethod(scores.weight_magnitude)
