"""How many weights or channels may live at a step of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domainbed_sfp.errors import UserError
from domainbed_sfp.hparams import Hparam

SCHEDULE_HPARAMS = {
    "sparsity": Hparam(0.5, lambda r: r.choice([0.3, 0.5, 0.7, 0.9]), "fraction removed at the end, in [0, 1)"),
    "prune_start": Hparam(0.15, doc="fraction of the run at which pruning begins"),
    "prune_end": Hparam(0.8, doc="fraction of the run at which the mask is final"),
}


@dataclass(frozen=True)
class CubicSchedule:
    """Dense until t0, s(t) = s_f (1 - (1 - (t - t0) / (t1 - t0))^3) until t1, then s_f (Zhu & Gupta 2017).

    Args:
        sparsity: s_f, the fraction removed in the end, in [0, 1).
        start, end: t0 and t1 as fractions of the run, 0 <= start <= end <= 1. Where they are equal, everything is
            removed at once.

    Raises:
        UserError: for a sparsity outside [0, 1), or a schedule that ends before it begins.
    """

    sparsity: float
    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UserError(f"hparam 'sparsity': expected a fraction removed in [0, 1), got {self.sparsity}")
        for name, value in (("prune_start", self.start), ("prune_end", self.end)):
            if not 0 <= value <= 1:
                raise UserError(f"hparam {name!r}: expected a fraction of the run in [0, 1], got {value}")
        if self.end < self.start:
            raise UserError(
                f"the pruning schedule ends before it begins: prune_start {self.start}, prune_end {self.end}"
            )

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> CubicSchedule:
        """The schedule of hparams `sparsity`, `prune_start` and `prune_end`."""
        return cls(hparams["sparsity"], hparams["prune_start"], hparams["prune_end"])

    def first_step(self, total_steps: int) -> int:
        """t0, the step from which the ramp rises."""
        return min(round(self.start * total_steps), total_steps - 1)

    def last_step(self, total_steps: int) -> int:
        """t1, the step from which the mask is final; within the run, so that every run gets there."""
        return min(round(self.end * total_steps), total_steps - 1)

    def at(self, step: int, total_steps: int) -> float:
        """Sparsity at `step` (0 .. total_steps - 1)."""
        first, last = self.first_step(total_steps), self.last_step(total_steps)
        if step >= last:
            return self.sparsity
        if step <= first:
            return 0.0
        return self.sparsity * (1 - (1 - (step - first) / (last - first)) ** 3)
