"""Which runs are trained again: cited ones, drawn after the bundle is fixed, so that nobody can know them before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping


def draw(cited: Mapping[str, set[str]], per_environment: int, digest: str, seed: int) -> list[str]:
    """`per_environment` runs of each test environment, or all where it has fewer.

    Args:
        cited: by test environment, the runs that a selection rule chose.
        digest: of the bundle; with it the draw depends on every byte that was submitted.
        seed: drawn once the digest is known.
    """
    chosen: dict[str, None] = {}
    for environment, runs in sorted(cited.items()):
        source = hashlib.sha256(f"{digest} {seed} {environment}".encode()).digest()
        count = min(per_environment, len(runs))
        chosen.update(dict.fromkeys(random.Random(source).sample(sorted(runs), count)))
    return list(chosen)
