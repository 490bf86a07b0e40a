"""SNIP: single-shot network pruning based on connection sensitivity (Lee, Ajanthan, Torr 2019, arXiv 1810.02340)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.at_initialization import AT_INITIALIZATION_HPARAMS, PruningAtInitialization
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.pruning import scores


@register("SNIP", family="pruning", reference="Lee et al. 2019, arXiv 1810.02340", hparams=AT_INITIALIZATION_HPARAMS)
class SNIP(PruningAtInitialization):
    """Keeps the weights of highest connection sensitivity |w dL/dw| before training (eqs. 5 and 6), L the cross-entropy
    on the first minibatches. A channel's score is the sum over the weights of its filters.

    The paper takes a balanced batch. Minibatches are small and as the environments are: here classes weigh alike,
    however many samples each has, and no sample is left out.
    """

    def weight_scores(
        self, network: nn.Module, weights: Mapping[str, Tensor], minibatches: Minibatches
    ) -> scores.Scores:
        x, y = (torch.cat(part) for part in zip(*minibatches))
        return scores.connection_sensitivity(network, weights, x, y)
