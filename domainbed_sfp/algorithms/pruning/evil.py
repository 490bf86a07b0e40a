"""EVIL, exploring variant parameters for invariant learning (Huang, Li, Shen, Yu, Gong, Han, Liu 2023, "Winning Prize
Comes from Losing Tickets", arXiv 2310.16391)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import RUN_FRACTION, SHARE, Hparam, but
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.schedules import EXCHANGE_INTERVAL, exchange_period


@dataclass(frozen=True)
class ExchangeSchedule:
    """Dense until t0, then sparse; from there on some of the living weights are exchanged every dT steps until t1.

    Args:
        sparsity: fraction removed, in [0, 1).
        start, end: t0 and t1 as fractions of the run.
        interval: dT as a fraction of the run, or 0 (see `schedules.exchange_period`).
        fraction: of the living weights, exchanged at the beginning; it falls to 0 at t1 along a cosine.
    """

    sparsity: float
    start: float
    end: float
    interval: float
    fraction: float

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise UserError(f"the exchange ends before it begins: prune_start {self.start}, update_end {self.end}")

    def first_step(self, total_steps: int) -> int:
        return min(round(self.start * total_steps), total_steps - 1)

    def period(self, total_steps: int) -> int:
        """dT in steps."""
        return exchange_period(self.interval, total_steps)

    def end_step(self, total_steps: int) -> int:
        """t1 in steps, within the run."""
        return min(round(self.end * total_steps), total_steps - 1)

    def last_step(self, total_steps: int) -> int:
        first, period = self.first_step(total_steps), self.period(total_steps)
        return first + max(0, self.end_step(total_steps) - first - 1) // period * period

    def at(self, step: int, total_steps: int) -> float:
        return self.sparsity if step >= self.first_step(total_steps) else 0.0

    def exchanges_at(self, step: int, total_steps: int) -> bool:
        """Whether weights are exchanged at `step`."""
        first = self.first_step(total_steps)
        return first < step <= self.last_step(total_steps) and (step - first) % self.period(total_steps) == 0

    def fraction_at(self, step: int, total_steps: int) -> float:
        """The fraction of the living weights exchanged at `step`."""
        first = self.first_step(total_steps)
        progress = (step - first) / max(1, self.end_step(total_steps) - first)
        return self.fraction / 2 * (1 + math.cos(math.pi * progress))


@register(
    "EVIL",
    family="pruning",
    reference="Huang et al. 2023, arXiv 2310.16391",
    hparams={
        "sparsity": UNIT_HPARAMS["sparsity"],
        "pruning_scope": replace(UNIT_HPARAMS["pruning_scope"], earlier="layer"),
        "objective": Hparam(
            "ERM",
            doc="training objective: ERM, IRM, VREx, GroupDRO or CORAL",
            valid=but("Mixup", "it tells domains apart, and that mixes them"),
        ),
        "prune_start": Hparam(0.2, doc="fraction of the run at which the magnitude mask is made", valid=RUN_FRACTION),
        "update_end": Hparam(0.75, doc="fraction of the run after which the mask is final", valid=RUN_FRACTION),
        "update_interval": EXCHANGE_INTERVAL,
        "update_fraction": Hparam(
            0.3, lambda r: r.choice([0.1, 0.3, 0.5]), "of the living weights, exchanged at the start", valid=SHARE
        ),
    },
    retired={
        "granularity": "weight",
        "growth_gradient": "domain",
        "gradient_steps": 20,
    },
)
class EVIL(ScheduledPruning):
    """Exchanges the weights that matter least for those that tell domains apart least.

    Dense until `prune_start`, then a magnitude mask of the final sparsity. From there on, every dT steps, each layer
    drops its living weights of smallest |w| and grows as many, at zero, among the others: those for which the gradient
    of a domain classification loss is *smallest*, the parameters found invariant. A linear classifier of the training
    domains, trained alongside on the features without moving them, gives that loss. The exchanged fraction falls along
    a cosine, as in RigL (arXiv 1911.11134), on whose code the authors' is built.

    With `pruning_scope` global the magnitude mask is of all weights ranked together; exchanges leave each layer as many
    as that gave it. A weight just dropped may win its place back, and then keeps its value. A dead channel has no
    gradient by which it could be chosen, so only single weights are exchanged.

    What grows follows the paper's intent. In the authors' code (github.com/tmllab/EVIL) the domain classifier is never
    updated, and its gradient is added to those of the training loss in the last 20 steps. Other differences: there the
    first layer is dense and the share of weights kept is one minus what its hparam `dense_allocation` says; of 5,000
    steps the mask is made at step 1,000, the exchanged fraction begins at .2 (here .3, RigL's), and exchanges are 400
    steps apart until step 4,000.
    """

    granularity = "weight"
    schedule: ExchangeSchedule

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        if num_domains < 2:
            raise UserError(f"EVIL tells training domains apart: expected at least 2, got {num_domains}")
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.domain_classifier = nn.Linear(self.featurizer.n_outputs, num_domains)
        self.domain_optimizer = torch.optim.Adam(self.domain_classifier.parameters(), lr=self.hparams["lr"])
        self.domain_gradients: dict[str, Tensor] = {}

    def make_schedule(self) -> ExchangeSchedule:
        names = ("sparsity", "prune_start", "update_end", "update_interval", "update_fraction")
        return ExchangeSchedule(*(self.hparams[name] for name in names))

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        seen: list[Tensor] = []
        handle = self.featurizer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            loss, metrics = super().compute_loss(minibatches)
        finally:
            handle.remove()
        # Objectives that run the network domain by domain do so in the domains' order.
        features = torch.cat(seen)
        sizes = torch.tensor([len(y) for _, y in minibatches], device=features.device)
        domains = torch.arange(len(sizes), device=features.device).repeat_interleave(sizes)
        domain_loss = self._domain_loss(features.detach(), domains)
        if self.schedule.exchanges_at(self.step, self.total_steps):
            self.domain_gradients = self._domain_gradients(features, domains)
        return loss, {**metrics, "domain_loss": domain_loss}

    def score(self, minibatches: Minibatches) -> scores.Scores:
        parameters = dict(self.named_parameters())
        return scores.by_weight(scores.weight_magnitude, {name: parameters[name] for name in self.unit_shapes})

    def choose_alive(self, minibatches: Minibatches, sparsity: float) -> dict[str, Tensor]:
        if self.step == self.schedule.first_step(self.total_steps):
            return super().choose_alive(minibatches, sparsity)
        fraction = self.schedule.fraction_at(self.step, self.total_steps)
        gradients, self.domain_gradients = self.domain_gradients, {}
        parameters = dict(self.named_parameters())
        return {
            name: exchange(parameters[name], gradient, self.weight_masks[name], fraction)
            for name, gradient in gradients.items()
        }

    @torch.no_grad()
    def renew_masks(self, minibatches: Minibatches) -> None:
        before = self.masks()
        super().renew_masks(minibatches)
        parameters = dict(self.named_parameters())
        for name, earlier in before.items():
            grown = self.weight_masks[name] & ~earlier
            # This step's update has just moved the weight from zero, and its moments are of the time it was dead.
            weight = parameters[name]
            weight.masked_fill_(grown, 0.0)
            for moments in self.optimizer.state.get(weight, {}).values():
                if isinstance(moments, Tensor) and moments.shape == weight.shape:
                    moments.masked_fill_(grown, 0.0)

    def mask_is_due(self) -> bool:
        begins = self.step == self.schedule.first_step(self.total_steps)
        return begins or self.schedule.exchanges_at(self.step, self.total_steps)

    def _domain_loss(self, features: Tensor, domains: Tensor) -> float:
        """The domain classifier's loss on features [N, D] without their graph; trains it."""
        loss = F.cross_entropy(self.domain_classifier(features), domains)
        self.domain_optimizer.zero_grad()
        loss.backward()
        self.domain_optimizer.step()
        return loss.item()

    def _domain_gradients(self, features: Tensor, domains: Tensor) -> dict[str, Tensor]:
        """Of the domain classification loss, for every prunable weight, the dead ones too."""
        parameters = dict(self.named_parameters())
        weights = [parameters[name] for name in self.unit_shapes]
        loss = F.cross_entropy(self.domain_classifier(features), domains)
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
        return dict(zip(self.unit_shapes, gradients))


@torch.no_grad()
def exchange(weight: Tensor, gradient: Tensor, alive: Tensor, fraction: float) -> Tensor:
    """The mask of a layer after `fraction` of its living weights was exchanged; all tensors have the weight's shape.

    The smallest |weight| are dropped; as many of the smallest |gradient| are grown among all that were not kept. A
    gradient of exactly zero says that a weight reaches no output at all, as behind a channel that never fires or where
    a kernel sees nothing but padding, and not that it is invariant: such weights come last. Ties are broken by
    position.
    """
    count = int(fraction * int(alive.sum()))
    mask = alive.flatten().clone()
    mask[weight.abs().masked_fill(~alive, torch.inf).flatten().argsort(stable=True)[:count]] = False
    growth = gradient.abs().flatten()
    growth = growth.masked_fill(growth == 0, torch.finfo(growth.dtype).max).masked_fill(mask, torch.inf)
    mask[growth.argsort(stable=True)[:count]] = True
    return mask.view(weight.shape)
