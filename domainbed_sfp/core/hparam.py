"""What a hyperparameter is: its default, how a random search draws it, and the values it may have.

Each is drawn from a `RandomState` of its own, seeded by (random seed, hparam name) as DomainBed does, so that adding
one never shifts another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from domainbed_sfp.core.errors import LARGEST, UserError, unknown_name
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
    earlier: what runs did before there was this hparam, whose records do not name it; None: it was always there.
    """

    default: Any
    sample: Sampler | None = None
    doc: str = ""
    foreign: bool = False
    valid: Range | None = None
    photographs: Any = None
    earlier: Any = None

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


def checked_value(algorithm: str, name: str, value: Any, hparam: Hparam) -> Any:
    """`value` if it is in range, of the default's kind: whole floats become integers, integers floats."""
    default = hparam.default
    if isinstance(default, bool):
        matches, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        whole = isinstance(value, float) and value.is_integer()
        matches, expected = (isinstance(value, int) or whole) and not isinstance(value, bool), "a whole number"
        value = int(value) if matches else value
        if matches and abs(value) > LARGEST:
            matches, expected = False, f"a whole number of at most {LARGEST}"
    elif isinstance(default, float):
        matches, expected = _is_finite_number(value), "a number"
        value = float(value) + 0.0 if matches else value  # which turns -0.0 into 0.0
    else:
        matches, expected = isinstance(value, type(default)), f"a {type(default).__name__}"
    if not matches:
        raise UserError(f"hparam {name!r} of {algorithm}: expected {expected}, got {value!r:.80}")
    if hparam.valid is not None and not hparam.valid.holds(value):
        if hparam.valid.choices:
            raise unknown_name(f"{name} of {algorithm}", value, hparam.valid.choices)
        raise UserError(f"hparam {name!r} of {algorithm}: expected {hparam.valid.words}, got {value!r}")
    return value


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False
