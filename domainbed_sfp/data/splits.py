"""Which samples of an environment are trained on, held out, or given unlabelled: DomainBed's splits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from domainbed_sfp.core.seeds import seed_hash


@dataclass(frozen=True)
class Split:
    """Indices into an environment. `uda` is empty unless the environment is a test environment."""

    in_: np.ndarray
    out: np.ndarray
    uda: np.ndarray


def split_keys(keys: list[int], n: int, seed: int) -> tuple[list[int], list[int]]:
    """`keys` shuffled by `RandomState(seed)`, as (the first n, the rest).

    DomainBed shuffles positions; the order in which `keys` come therefore matters.
    """
    positions = list(range(len(keys)))
    np.random.RandomState(seed).shuffle(positions)
    return [keys[p] for p in positions[:n]], [keys[p] for p in positions[n:]]


def split_environment(
    size: int, env_i: int, trial_seed: int, holdout_fraction: float, uda_holdout_fraction: float = 0.0
) -> Split:
    """The splits of environment number `env_i` with `size` samples, as DomainBed's train makes them."""
    seed = seed_hash(trial_seed, env_i)
    out, in_ = split_keys(list(range(size)), int(size * holdout_fraction), seed)
    uda: list[int] = []
    if uda_holdout_fraction:
        uda, in_ = split_keys(in_, int(len(in_) * uda_holdout_fraction), seed)
    return Split(*(np.array(part, dtype=np.int64) for part in (in_, out, uda)))
