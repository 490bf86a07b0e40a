"""Seeds derived from names, as DomainBed derives them."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def seed_hash(*args: object) -> int:
    """An integer in [0, 2**31) that depends on all `args`: md5 of the tuple's text, as in DomainBed.

    The text of a numpy scalar differs between numpy 1 and 2, so numpy scalars are turned into
    python numbers first; the value is then the one DomainBed gives for python numbers.
    """
    plain = tuple(arg.item() if isinstance(arg, np.generic) else arg for arg in args)
    return int(hashlib.md5(str(plain).encode("utf-8")).hexdigest(), 16) % (2**31)


def seed_everything(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch (all devices)."""
    import torch  # here, since commands that only name seeds start at once without it

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
