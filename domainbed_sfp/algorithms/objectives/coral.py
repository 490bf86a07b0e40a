"""Deep CORAL (Sun & Saenko 2016, arXiv 1607.01719), between pairs of training environments."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches, Objective, ObjectiveAlgorithm
from domainbed_sfp.algorithms.registry import register, register_objective
from domainbed_sfp.core.hparam import NOT_NEGATIVE, Hparam

HPARAMS = {
    "mmd_gamma": Hparam(1.0, lambda r: 10 ** r.uniform(-1, 1), "weight of the feature alignment", valid=NOT_NEGATIVE)
}


def coral_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the means plus that of the covariances of features [N, D] and [M, D]."""

    def moments(features: Tensor) -> tuple[Tensor, Tensor]:
        mean = features.mean(0, keepdim=True)
        centred = features - mean
        # A batch of one sample has no covariance; 0/1 keeps it finite where 0/0 would not.
        return mean, centred.t() @ centred / max(len(features) - 1, 1)

    (mean_a, covariance_a), (mean_b, covariance_b) = moments(a), moments(b)
    return (mean_a - mean_b).pow(2).mean() + (covariance_a - covariance_b).pow(2).mean()


@register_objective("CORAL", HPARAMS)
class CORALObjective(Objective):
    """Mean risk over environments plus gamma times the mean CORAL distance over pairs of environments."""

    domain_by_domain = True

    def loss(self, algorithm: ObjectiveAlgorithm, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        features = [algorithm.features(x) for x, _ in minibatches]
        risks = [F.cross_entropy(algorithm.classify(part), y) for part, (_, y) in zip(features, minibatches)]
        nll = torch.stack(risks).mean()
        distances = [coral_distance(a, b) for a, b in combinations(features, 2)]
        penalty = torch.stack(distances).mean() if distances else nll.new_zeros(())
        # DomainBed logs the risk without the penalty under `loss`.
        return nll + self.hparams["mmd_gamma"] * penalty, {"loss": nll.item(), "penalty": penalty.item()}


@register(
    "CORAL", family="objective", reference="Sun & Saenko 2016, arXiv 1607.01719", standing="reference", hparams=HPARAMS
)
class CORAL(ObjectiveAlgorithm):
    """Correlation alignment."""

    objective_name = "CORAL"
