"""What a hyperparameter is: its default, how a random search draws it, and the values it may have.

Each is drawn from a `RandomState` of its own, seeded by (random seed, hparam name) as DomainBed does, so that adding
one never shifts another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainbed_sfp.core.seeds import seed_hash

Sampler = Callable[[np.random.RandomState], Any]


@dataclass(frozen=True)
class Range:
    """The values an hparam may have: in words, and as a test; `choices` where they are names."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


POSITIVE = Range("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Range("a number of at least 0", lambda value: value >= 0)
AT_LEAST_ONE = Range("a whole number of at least 1", lambda value: value >= 1)
FRACTION = Range("a fraction in [0, 1)", lambda value: 0 <= value < 1)
RUN_FRACTION = Range("a fraction of the run in [0, 1]", lambda value: 0 <= value <= 1)
SHARE = Range("a share in [0, 1]", lambda value: 0 <= value <= 1)
PROBABILITY = Range("a probability in [0, 1]", lambda value: 0 <= value <= 1)


def only(choice: str, why: str) -> Range:
    """The range of an hparam that others of its family choose, and that has one value here."""
    return Range(f"{choice!r} ({why})", lambda value: value == choice)


def but(unfit: str, why: str) -> Range:
    """The range of an hparam that is a registered name, but not `unfit`."""
    return Range(f"another than {unfit!r} ({why})", lambda value: value != unfit)


def one_of(*choices: str) -> Range:
    """The range of an hparam that is one of some words."""
    return Range("one of " + ", ".join(choices), lambda value: value in choices, choices)


@dataclass(frozen=True)
class Hparam:
    """A hyperparameter: its default, how a random search draws it, a line of explanation, and what it may be.

    foreign: a field of DomainBed's records that has no effect here; it cannot be set.
    photographs: the default on sets of photographs, where it is another than on MNIST-like ones.
    """

    default: Any
    sample: Sampler | None = None
    doc: str = ""
    foreign: bool = False
    valid: Range | None = None
    photographs: Any = None

    def on(self, small_images: bool) -> Hparam:
        """The same hparam with its default on MNIST-like images, or on photographs."""
        return self if small_images or self.photographs is None else replace(self, default=self.photographs)

    def draw(self, name: str, random_seed: int) -> Any:
        """The random value of hparam `name` for `random_seed`; the default where nothing is searched."""
        if self.sample is None:
            return self.default
        value = self.sample(np.random.RandomState(seed_hash(random_seed, name)))
        # numpy scalars are not JSON, and DomainBed's records are.
        return value.item() if isinstance(value, np.generic) else value


# Records have these fields so that DomainBed's tools read them.
FOREIGN = "no effect here"
