"""Lottery tickets: iterative magnitude pruning with rewinding (Frankle & Carbin 2019, arXiv 1803.03635)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.algorithms.pruning.magnitude import Magnitude
from domainbed_sfp.algorithms.pruning.scheduled import UNIT_HPARAMS
from domainbed_sfp.algorithms.registry import register
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import AT_LEAST_ONE, RUN_FRACTION, Hparam
from domainbed_sfp.pruning.schedules import RETRAINED_END, RoundSchedule
from domainbed_sfp.pruning.state import NamedTensors


@register(
    "LotteryTicket",
    family="pruning",
    reference="Frankle & Carbin 2019, arXiv 1803.03635; rewinding: Frankle et al. 2020, arXiv 1912.05671",
    hparams={
        **UNIT_HPARAMS,
        "rounds": Hparam(3, lambda r: r.choice([2, 3, 5]), "prunings, each followed by rewinding", valid=AT_LEAST_ONE),
        "prune_end": Hparam(0.6, doc="fraction of the run at which the last round begins", valid=RETRAINED_END),
        "rewind": Hparam(
            0.01,
            lambda r: r.choice([0.0, 0.01, 0.03]),
            "fraction of the run to whose state it rewinds",
            valid=RUN_FRACTION,
        ),
    },
)
class LotteryTicket(Magnitude):
    """Trains, prunes by magnitude and rewinds what is left to an early step, in a few rounds; the last trains on.

    Each round prunes the same fraction of what is left (iterative pruning with resetting, Frankle & Carbin, section 2
    and appendix B); all but the last are equally long. What is rewound is the training state of step `rewind` (Frankle
    et al. 2020, algorithm 2): weights, normalization statistics, optimizer and the objective's counters, as if training
    had continued from there with the mask. `rewind` 0 is the state the run begins with.
    """

    schedule: RoundSchedule

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        rewind, first = self.hparams["rewind"], self.schedule.end / self.schedule.rounds
        if rewind > first:
            raise UserError(
                f"hparam 'rewind': expected a fraction of the run before the first pruning ({first:g}), got {rewind}"
            )
        self.early = nn.ModuleDict({name: NamedTensors(part.state_dict()) for name, part in self._parts().items()})
        # Never steps: it holds the moments of the early step, and checkpoints know how to keep an optimizer.
        self.early_optimizer = self.make_optimizer()

    def make_schedule(self) -> RoundSchedule:
        return RoundSchedule(self.hparams["sparsity"], self.hparams["rounds"], self.hparams["prune_end"])

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        if self.step == round(self.hparams["rewind"] * self.total_steps):
            self._store()
        return super().update(minibatches, unlabeled)

    def mask_is_due(self) -> bool:
        return self.step in self.schedule.steps(self.total_steps)

    def renew_masks(self, minibatches: Minibatches) -> None:
        super().renew_masks(minibatches)
        if self.schedule.at(self.step, self.total_steps) > 0:
            self._rewind()

    def _parts(self) -> dict[str, nn.Module]:
        return {"network": self.network, "objective": self.objective}

    def _store(self) -> None:
        for name, part in self._parts().items():
            self.early[name].copy_from(part.state_dict())  # type: ignore[operator]
        _copy_optimizer(self.optimizer, self.early_optimizer)

    def _rewind(self) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(self.early[name].as_dict())  # type: ignore[operator]
        _copy_optimizer(self.early_optimizer, self.optimizer)


def _copy_optimizer(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    # A state dict holds the optimizer's own tensors, and loading may keep them: without a copy both would share them.
    target.load_state_dict(copy.deepcopy(source.state_dict()))
