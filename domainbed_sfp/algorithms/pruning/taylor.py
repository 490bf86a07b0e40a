"""Importance estimation for neural network pruning (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import PRUNING_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.hparam import FRACTION, Hparam
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.state import NamedTensors


@register(
    "Taylor",
    family="pruning",
    reference="Molchanov et al. 2019, arXiv 1906.10771",
    hparams={
        **PRUNING_HPARAMS,
        "taylor_momentum": Hparam(
            0.9, lambda r: r.choice([0.9, 0.99]), "of the running average of the scores", valid=FRACTION
        ),
    },
)
class Taylor(ScheduledPruning):
    """Keeps the units whose removal changes the loss most, to first order.

    A channel's importance is (dL/dz)^2 of a gate z on what is read of it, that is (sum of g w)^2 over the weights that
    read it; a weight's is (g w)^2 (section 3). L is the training objective. Importances of single steps enter a running
    average with momentum .9, as in the authors' code, and the cubic ramp takes the place of their schedule. The paper
    ranks the gates of all layers together, which is `pruning_scope` "global" here; by default units are compared within
    their layer, so that methods are compared at the same cost.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.importance = NamedTensors({name: torch.zeros(shape) for name, shape in self.unit_shapes.items()})

    @torch.no_grad()
    def after_backward(self) -> None:
        if self.step > self.schedule.last_step(self.total_steps):
            return
        parameters = dict(self.named_parameters())
        if self.granularity == "channel":
            latest = scores.by_group(scores.channel_taylor, self.groups, parameters)
        else:
            latest = scores.by_weight(scores.weight_taylor, {name: parameters[name] for name in self.unit_shapes})
        for name, value in latest.items():
            self.importance[name].lerp_(value, 1 - self.hparams["taylor_momentum"])

    def score(self, minibatches: Minibatches) -> scores.Scores:
        return self.importance.as_dict()
