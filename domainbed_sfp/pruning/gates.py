"""Gates: one trainable number per unit that says how likely the unit lives, and random masks drawn from it.

A relaxed Bernoulli mask: with noise n = log u - log(1 - u), u uniform, the binary concrete
distribution (Maddison et al. 2017, arXiv 1611.00712, appendix B; Jang et al. 2017, arXiv 1611.01144) is that of
sigmoid(sharpness * (logit + n)). It exceeds 1/2 with probability sigmoid(logit), whatever the sharpness.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from domainbed_sfp.pruning.groups import ChannelGroup

# Keeps the noise within +-11.5, so that a probability of 0 or 1 (see `log_odds`) is never overruled by it.
SMALLEST_UNIFORM = 1e-5
# Keeps the log-odds of 0 and 1 finite.
SMALLEST_ODDS = 1e-6


def logistic_noise(like: Tensor) -> Tensor:
    """log u - log(1 - u) for uniform u, of the shape of `like`: the difference of two Gumbel variables."""
    return torch.rand_like(like).clamp_(SMALLEST_UNIFORM, 1 - SMALLEST_UNIFORM).logit_()


def binary_concrete(logits: Tensor, noise: Tensor, sharpness: float = 1.0) -> Tensor:
    """sigmoid(sharpness * (logits + noise)), in (0, 1): the larger the sharpness, the nearer to a binary mask."""
    return torch.sigmoid(sharpness * (logits + noise))


def straight_through(logits: Tensor, noise: Tensor) -> Tensor:
    """The binary mask 1[logits + noise > 0], with the gradient of `binary_concrete` at sharpness 1 (Csordas et al.
    2021, arXiv 2010.02066, section 2)."""
    relaxed = binary_concrete(logits, noise)
    return relaxed + ((relaxed > 0.5).to(relaxed.dtype) - relaxed).detach()


def log_odds(probabilities: Tensor) -> Tensor:
    """log s - log(1 - s), finite and with finite gradient at 0 and 1, so that a unit may come back from there."""
    return torch.log(probabilities + SMALLEST_ODDS) - torch.log(1 - probabilities + SMALLEST_ODDS)


def projection_shift(scores: Tensor, total: float) -> float:
    """The v with which clamp(scores - v, 0, 1) projects `scores` onto {0 <= s <= 1, sum s <= total} (Euclidean).

    By the optimality conditions v >= 0, and v > 0 only where the sum is `total`; found by bisection (SparseIRM, Zhou et
    al. 2022, algorithm 1), with a Newton step instead of the midpoint where it stays between the bounds: the sum is
    piecewise linear in v. The sum at the returned v is `total` up to a millionth of the number of scores.
    """
    low, high, v = 0.0, float(scores.max()), 0.0
    for iteration in range(100):
        shifted = scores - v
        excess = float(shifted.clamp(0, 1).sum(dtype=torch.float64)) - total
        if abs(excess) <= 1e-6 * scores.numel() or (v == 0 and excess < 0):
            break
        low, high = (v, high) if excess > 0 else (low, v)
        moving = int(((shifted > 0) & (shifted < 1)).sum())
        v = v + excess / moving if moving else low
        # Every third step halves the interval, whatever Newton's steps do.
        if not low < v < high or iteration % 3 == 2:
            v = (low + high) / 2
    return v


def gated_weights(
    gates: Mapping[str, Tensor], groups: Iterable[ChannelGroup], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights multiplied by their gates, by parameter name.

    Without groups `gates` go by parameter name, each of its shape. With groups they go by group name, [channels], and
    multiply the weights that read a channel: what later layers see is then gate * activation. The filters stay as they
    are, since a normalization behind them would undo a factor, and since a closed gate in two places has no gradient.
    """
    groups = list(groups)
    if not groups:
        return {name: parameters[name] * gate for name, gate in gates.items()}
    weights: dict[str, Tensor] = {}
    for group in groups:
        for name in group.readers:
            weight = weights.get(name, parameters[name])
            # A linear layer after a flattened feature map reads several numbers of each channel.
            columns = gates[group.name].repeat_interleave(weight.shape[1] // group.channels)
            weights[name] = weight * columns.view(1, -1, *[1] * (weight.dim() - 2))
    return weights
