"""RigL: rigging the lottery, making all tickets winners (Evci, Gale, Menick, Castro, Elsen 2020, arXiv 1911.11134)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS, ScheduledPruning
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import RUN_FRACTION, SHARE, Hparam, one_of
from domainbed_sfp.pruning import scores
from domainbed_sfp.pruning.masks import keep_highest, removed_units
from domainbed_sfp.pruning.schedules import EXCHANGE_INTERVAL, exchange_period


@dataclass(frozen=True)
class RigLSchedule:
    """Sparse from the first step; every dT steps until T_end a fraction of the weights moves.

    Args:
        sparsity: fraction removed all along, in [0, 1).
        interval: dT as a fraction of the run, or 0 (see `schedules.exchange_period`).
        end: T_end as a fraction of the run.
        drop_fraction: alpha.
    """

    sparsity: float
    interval: float
    end: float
    drop_fraction: float

    def period(self, total_steps: int) -> int:
        """dT in steps; at least 2, since a step that moves weights does not train them."""
        return max(2, exchange_period(self.interval, total_steps))

    def end_step(self, total_steps: int) -> int:
        """T_end in steps."""
        return round(self.end * total_steps)

    def moves_at(self, step: int, total_steps: int) -> bool:
        """Whether weights move at `step`."""
        return 0 < step < self.end_step(total_steps) and step % self.period(total_steps) == 0

    def fraction_at(self, step: int, total_steps: int) -> float:
        """f(t) = alpha / 2 (1 + cos(pi t / T_end)), the fraction of the living weights that move at step t."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / self.end_step(total_steps)))

    def first_step(self, total_steps: int) -> int:
        return 0

    def last_step(self, total_steps: int) -> int:
        period = self.period(total_steps)
        return max(0, self.end_step(total_steps) - 1) // period * period

    def at(self, step: int, total_steps: int) -> float:
        return self.sparsity


@register(
    "RigL",
    family="pruning",
    reference="Evci et al. 2020, arXiv 1911.11134",
    hparams={
        "sparsity": UNIT_HPARAMS["sparsity"],
        "objective": UNIT_HPARAMS["objective"],
        "sparsity_distribution": Hparam(
            "erk",
            lambda r: r.choice(["erk", "uniform"]),
            "erk: Erdos-Renyi-Kernel; uniform: the first layer dense",
            valid=one_of("erk", "uniform"),
        ),
        "drop_fraction": Hparam(
            0.3, lambda r: r.choice([0.1, 0.3, 0.5]), "alpha, of the living weights, at the start", valid=SHARE
        ),
        "update_interval": EXCHANGE_INTERVAL,
        "update_end": Hparam(
            0.75, doc="the paper's T_end: fraction of the run after which the mask is final", valid=RUN_FRACTION
        ),
    },
    retired={"granularity": "weight"},
)
class RigL(ScheduledPruning):
    """Trains a sparse network whose weights move: the smallest are dropped, those of largest gradient grown.

    It begins with a random mask of the final sparsity. At every dT-th step before T_end each layer drops the fraction
    f(t) of its living weights with smallest |w|, and grows as many, at zero, among all that were not kept: those with
    the largest |gradient| of the dense network (section 3, algorithm 1). As there, such a step moves weights and does
    not train. As in the authors' code, a weight just dropped may win its place back, and then keeps its value, and the
    optimizer's moments begin at zero for a weight that was dead.
    """

    granularity = "weight"
    prunes_before_update = True
    schedule: RigLSchedule

    def make_schedule(self) -> RigLSchedule:
        return RigLSchedule(
            self.hparams["sparsity"],
            self.hparams["update_interval"],
            self.hparams["update_end"],
            self.hparams["drop_fraction"],
        )

    def choose_alive(self, minibatches: Minibatches, sparsity: float) -> dict[str, Tensor]:
        drawn = scores.random_like(self.unit_shapes, minibatches[0][0].device)
        densities = self.densities()
        return {name: keep_highest({name: drawn[name]}, 1 - densities[name])[name] for name in self.unit_shapes}

    def after_backward(self) -> None:
        if self.schedule.moves_at(self.step, self.total_steps):
            self._move_weights(self.schedule.fraction_at(self.step, self.total_steps))
            # An optimizer leaves alone what has no gradient: this step does not train.
            self.optimizer.zero_grad(set_to_none=True)

    def removed_in_the_end(self) -> dict[tuple[str, ...], int]:
        densities = self.densities()  # refuses at once what cannot be met at the first step
        return {(name,): removed_units(shape.numel(), 1 - densities[name]) for name, shape in self.unit_shapes.items()}

    def densities(self) -> dict[str, float]:
        """The density of each layer, by unit name."""
        return layer_densities(self.unit_shapes, 1 - self.schedule.sparsity, self.hparams["sparsity_distribution"])

    def mask_is_due(self) -> bool:
        return self.step == 0

    @torch.no_grad()
    def _move_weights(self, fraction: float) -> None:
        parameters = dict(self.named_parameters())
        for name in self.unit_shapes:
            weight, alive = parameters[name], self.weight_masks[name].clone()
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            moved = drop_and_grow(weight, gradient, alive, fraction)
            grown = moved & ~alive
            weight.masked_fill_(grown, 0.0)
            for moments in self.optimizer.state.get(weight, {}).values():
                if isinstance(moments, Tensor) and moments.shape == weight.shape:
                    moments.masked_fill_(grown, 0.0)
            self.weight_masks.set(name, moved)


def drop_and_grow(weight: Tensor, gradient: Tensor, alive: Tensor, fraction: float) -> Tensor:
    """The mask of a layer after `fraction` of its living weights moved; all tensors have the weight's shape.

    The smallest |weight| are dropped; as many of the largest |gradient| are grown among all that were not kept. Ties
    are broken by position.
    """
    moving = int(fraction * int(alive.sum()))
    dropped = weight.abs().masked_fill(~alive, torch.inf).flatten().argsort(stable=True)[:moving]
    moved = alive.flatten().clone()
    moved[dropped] = False
    growth = gradient.abs().flatten().masked_fill(moved, -torch.inf)
    moved[growth.argsort(descending=True, stable=True)[:moving]] = True
    return moved.view(weight.shape)


def layer_densities(shapes: Mapping[str, torch.Size], density: float, distribution: str) -> dict[str, float]:
    """The density of each layer, so that all together have `density`; `distribution` is one of two.

    erk: in proportion to sum(shape) / prod(shape), the Erdos-Renyi-Kernel of section 3; layers that would need more
    than all their weights are dense. uniform: the first layer is dense, as there, and the others share one density,
    which makes up for it.

    Raises:
        UserError: where the dense first layer alone is more than may live.
    """
    by_kernel = distribution == "erk"
    raw = {name: sum(shape) / shape.numel() if by_kernel else 1.0 for name, shape in shapes.items()}
    dense = set() if by_kernel else set(list(shapes)[:1])
    total = sum(shape.numel() for shape in shapes.values())
    while open_layers := [name for name in shapes if name not in dense]:
        left = density * total - sum(shapes[name].numel() for name in dense)
        scale = left / sum(raw[name] * shapes[name].numel() for name in open_layers)
        if scale <= 0:
            raise UserError(
                f"hparam 'sparsity' {1 - density:g} leaves nothing beside the first layer, which is dense with "
                "sparsity_distribution 'uniform'; lower it or choose 'erk'"
            )
        full = {name for name in open_layers if scale * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        # One at a time, as in the authors' code: less is left for the others then.
        largest = max(raw[name] for name in full)
        dense |= {name for name in full if raw[name] == largest}
    return dict.fromkeys(shapes, 1.0)
