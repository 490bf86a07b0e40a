"""SNIP: single-shot network pruning based on connection sensitivity (Lee, Ajanthan, Torr 2019, arXiv 1810.02340)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning_at_initialization import (
    AT_INITIALIZATION_HPARAMS,
    PruningAtInitialization,
    balanced_batch,
)
from domainbed_sfp.pruning import scores
from domainbed_sfp.registry import register


@register("SNIP", family="pruning", reference="Lee et al. 2019, arXiv 1810.02340", hparams=AT_INITIALIZATION_HPARAMS)
class SNIP(PruningAtInitialization):
    """Keeps the weights of highest connection sensitivity |w dL/dw| before training (eqs. 5 and 6), L the cross-entropy
    on a batch with equally many samples of each class. A channel's score is the sum over the weights of its filters."""

    def weight_scores(
        self, network: nn.Module, weights: Mapping[str, Tensor], minibatches: Minibatches
    ) -> scores.Scores:
        return scores.connection_sensitivity(network, weights, *balanced_batch(minibatches))
