"""GraSP: gradient signal preservation (Wang, Zhang, Grosse 2020, arXiv 2002.07376)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.at_initialization import (
    AT_INITIALIZATION_HPARAMS,
    PruningAtInitialization,
    balanced_batch,
)
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.hparam import POSITIVE, Hparam
from domainbed_sfp.pruning import scores

# Of each class, from which scores are taken, where there are as many; as in the authors' code.
SAMPLES = 25


@register(
    "GraSP",
    family="pruning",
    reference="Wang et al. 2020, arXiv 2002.07376",
    hparams={
        **AT_INITIALIZATION_HPARAMS,
        "grasp_temperature": Hparam(
            200.0, lambda r: r.choice([1.0, 200.0]), "logits are divided by it, as in the code", valid=POSITIVE
        ),
    },
    retired={"grasp_samples": SAMPLES},
)
class GraSP(PruningAtInitialization):
    """Keeps the weights without which the gradient would flow least, before training.

    Taking weight w away changes the squared norm of the gradient g by 2 S(w) to first order, S = -w (H g) with H the
    Hessian: where S is negative the flow shrinks, so the weights with the *largest* S are removed (section 4,
    algorithm 1). g and H are of all convolutions and linear layers, the classifier included, as in the authors' code.
    First-order effects add up, and so a channel's score (this project's extension) is the sum over the weights that
    read it. Over those of its filters it would be minus the squared norm of their gradient wherever a normalization
    follows, whatever the curvature: scaling such a filter changes nothing, which leaves w (H g) = -g g.

    The authors' code takes 25 samples of each class. Here they come from the minibatches of the step before which it
    prunes: a class of which those hold fewer counts with what there is.
    """

    def weight_scores(
        self, network: nn.Module, weights: Mapping[str, Tensor], minibatches: Minibatches
    ) -> scores.Scores:
        x, y = balanced_batch(minibatches, SAMPLES)
        return scores.gradient_flow(network, weights, x, y, self.hparams["grasp_temperature"])

    def channel_scores(self, by_weight: scores.Scores) -> scores.Scores:
        return scores.channel_reader_sums(self.groups, by_weight)
