"""How many weights or channels may live at a step of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import FRACTION, RUN_FRACTION, Hparam, Range

SCHEDULE_HPARAMS = {
    "sparsity": Hparam(
        0.5, lambda r: r.choice([0.3, 0.5, 0.7, 0.9]), "fraction removed at the end, in [0, 1)", valid=FRACTION
    ),
    "prune_start": Hparam(0.15, doc="fraction of the run at which pruning begins", valid=RUN_FRACTION),
    "prune_end": Hparam(0.8, doc="fraction of the run at which the mask is final", valid=RUN_FRACTION),
}

# Where pruning ends, for methods that rewind or freeze weights: their outcome has to be trained.
RETRAINED_END = Range(
    "a fraction of the run in [0, 1), for steps to train what is kept have to follow", lambda value: 0 <= value < 1
)

# Of the methods that drop weights and grow others (RigL, EVIL): 100 steps in the papers, here of DomainBed's 5,001.
EXCHANGE_FRACTION = 100 / 5001
SHORTEST_EXCHANGE = 25
EXCHANGE_INTERVAL = Hparam(
    0.0,
    doc=f"the papers' dT: fraction of the run between two exchanges; 0: 2 %, but {SHORTEST_EXCHANGE} steps at least",
    valid=FRACTION,
)


def exchange_period(interval: float, total_steps: int) -> int:
    """Steps between two exchanges of weights: the fraction `interval` of the run, at least 1; by 0, EXCHANGE_FRACTION
    of it, at least SHORTEST_EXCHANGE: in a run of a few hundred steps the papers' 100 would become a handful, and what
    has just grown from zero would be the first to go again."""
    if interval == 0:
        return max(SHORTEST_EXCHANGE, round(EXCHANGE_FRACTION * total_steps))
    return max(1, round(interval * total_steps))


class Schedule(Protocol):
    """When masks change and how sparse they are; steps count from 0, `total_steps` is the length of the run."""

    @property
    def sparsity(self) -> float:
        """The fraction removed in the end."""

    def first_step(self, total_steps: int) -> int:
        """The step from which something may be removed."""

    def last_step(self, total_steps: int) -> int:
        """The step from which the mask is final."""

    def at(self, step: int, total_steps: int) -> float:
        """The fraction removed at `step`."""


def check_span(start: float, end: float) -> None:
    """Raises UserError where hparam `prune_end` is before `prune_start`."""
    if end < start:
        raise UserError(f"the pruning schedule ends before it begins: prune_start {start}, prune_end {end}")


@dataclass(frozen=True)
class CubicSchedule:
    """Dense until t0, s(t) = s_f (1 - (1 - (t - t0) / (t1 - t0))^3) until t1, then s_f (Zhu & Gupta 2017).

    Args:
        sparsity: s_f, the fraction removed in the end, in [0, 1).
        start, end: t0 and t1 as fractions of the run, 0 <= start <= end <= 1. Where they are equal, everything is
            removed at once.

    Raises:
        UserError: for a schedule that ends before it begins.
    """

    sparsity: float
    start: float
    end: float

    def __post_init__(self) -> None:
        check_span(self.start, self.end)

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


@dataclass(frozen=True)
class OneShotSchedule:
    """Dense until t0, then everything at once.

    Args:
        sparsity: fraction removed, in [0, 1).
        start: t0 as a fraction of the run.
    """

    sparsity: float
    start: float = 0.0

    def first_step(self, total_steps: int) -> int:
        return min(round(self.start * total_steps), total_steps - 1)

    def last_step(self, total_steps: int) -> int:
        return self.first_step(total_steps)

    def at(self, step: int, total_steps: int) -> float:
        return self.sparsity if step >= self.first_step(total_steps) else 0.0


class _Rounds:
    """A schedule that prunes at some steps and rests in between."""

    rounds: int

    def step_of(self, index: int, total_steps: int) -> int:
        """The step of pruning `index`, 0 .. rounds - 1, within the run."""
        raise TypeError(f"{type(self).__name__} does not define step_of(index, total_steps)")

    def steps(self, total_steps: int) -> list[int]:
        """The step of each pruning, within the run."""
        return [self.step_of(index, total_steps) for index in range(self.rounds)]

    def first_step(self, total_steps: int) -> int:
        return self.step_of(0, total_steps)

    def last_step(self, total_steps: int) -> int:
        return self.step_of(self.rounds - 1, total_steps)


@dataclass(frozen=True)
class RoundSchedule(_Rounds):
    """`rounds` prunings at equal distances, the last at `end`; each keeps the same fraction of what is left.

    After pruning i of n the density is (1 - s)^(i / n) (Frankle & Carbin 2019, section 2).

    Args:
        sparsity: s, the fraction removed in the end, in [0, 1).
        rounds: n.
        end: the last pruning as a fraction of the run.
    """

    sparsity: float
    rounds: int
    end: float

    def step_of(self, index: int, total_steps: int) -> int:
        return min(round(self.end * total_steps * (index + 1) / self.rounds), total_steps - 1)

    def at(self, step: int, total_steps: int) -> float:
        done = sum(step >= pruning for pruning in self.steps(total_steps))
        return 1 - (1 - self.sparsity) ** (done / self.rounds) if done < self.rounds else self.sparsity


@dataclass(frozen=True)
class StairSchedule(_Rounds):
    """`rounds` prunings at equal distances from t0 to t1, each of which removes the fraction s_f / rounds.

    Args:
        sparsity: s_f, the fraction removed in the end, in [0, 1).
        rounds: number of prunings; a single one is at t0.
        start, end: t0 and t1 as fractions of the run.
    """

    sparsity: float
    rounds: int
    start: float
    end: float

    def __post_init__(self) -> None:
        check_span(self.start, self.end)

    def step_of(self, index: int, total_steps: int) -> int:
        gap = (self.end - self.start) / max(1, self.rounds - 1)
        return min(round((self.start + gap * index) * total_steps), total_steps - 1)

    def at(self, step: int, total_steps: int) -> float:
        done = sum(step >= pruning for pruning in self.steps(total_steps))
        return self.sparsity * done / self.rounds if done < self.rounds else self.sparsity
