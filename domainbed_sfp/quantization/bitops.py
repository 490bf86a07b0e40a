"""Bit operations: what they are, what a policy expects of them, and how its choices are made to meet a budget.

A layer that multiplies weights of b_w bits with inputs of b_a bits counts b_w * b_a for each multiply-accumulate
operation. Everything else (normalisation, pooling, the policies themselves) counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.quantization.policy import WIDTHS, Choice
from domainbed_sfp.quantization.quantizers import WIDEST

# Assignments of a few layers are searched exhaustively, up to this many.
EXHAUSTIVE_SEARCH = 10_000
BISECTIONS = 40
# Evaluation's widths take so much less than the budget at most.
BUDGET_TOLERANCE = 0.05
# A single layer is raised by at most this many bits above the common shift.
LAYER_SHIFT = 3.0


@dataclass(frozen=True)
class BitOps:
    """The bit operations of a network for one image.

    pinned: of the layers whose width nobody chooses. macs: multiply-accumulate operations of the others, by name.
    all_macs: of all layers.
    """

    pinned: int
    macs: Mapping[str, int]
    all_macs: int

    @property
    def at_8_bits(self) -> int:
        return self.all_macs * WIDEST**2

    def check_budget(self, fraction: float, alike: bool = False) -> None:
        """Raises UserError unless some assignment of widths takes this fraction of the 8-bit network's BitOPs.

        alike: samples may not have different widths, so that a few layers reach only some budgets: one of them must lie
        within BUDGET_TOLERANCE below the fraction.
        """
        least = (self.pinned + sum(self.macs.values()) * WIDTHS[0] ** 2) / self.at_8_bits
        if not least <= fraction <= 1:
            raise UserError(
                f"hparam 'target_bitops': no assignment takes {fraction:g} of the 8-bit network's BitOPs; this network "
                f"can have {least:.4f} (all layers at {WIDTHS[0]} bits, the first and the classifier at {WIDEST}) to 1"
            )
        if not alike or len(WIDTHS) ** len(self.macs) > EXHAUSTIVE_SEARCH:
            return
        counts = torch.tensor(list(self.macs.values()), dtype=torch.float64)
        widths = torch.tensor(list(product(WIDTHS, repeat=len(counts))), dtype=torch.float64)
        reached = (self.pinned + widths.square() @ counts) / self.at_8_bits
        below = float(reached[reached <= fraction * (1 + 1e-9)].max())
        if below < (1 - BUDGET_TOLERANCE) * fraction:
            above = float(reached[reached > fraction].min())
            raise UserError(
                f"hparam 'target_bitops': widths that are the same for all images take {below:.4f} or {above:.4f} of "
                f"this network's BitOPs at 8 bits, nothing in between; got {fraction:g}"
            )

    def expected(self, trace: Mapping[str, Sequence[Choice]], bits: Tensor) -> Tensor:
        """Each sample's expected BitOPs [N] under the probabilities of its choices; differentiable."""
        squares = bits**2
        total: Tensor | float = float(self.pinned)
        for name, choices in trace.items():
            logs = torch.cat([choice.log_probabilities for choice in choices])
            total = total + self.macs[name] * (logs.exp() @ squares)
        assert isinstance(total, Tensor)
        return total

    def chosen(self, trace: Mapping[str, Sequence[Choice]], bits: Tensor) -> Tensor:
        """Each sample's BitOPs [N] with the widths that were chosen, in double precision."""
        squares = bits.double() ** 2
        total: Tensor | float = float(self.pinned)
        for name, choices in trace.items():
            total = total + self.macs[name] * squares[torch.cat([choice.index for choice in choices])]
        assert isinstance(total, Tensor)
        return total

    def uniform(self, bits: int) -> int:
        """BitOPs with every layer that is not pinned at `bits`."""
        return self.pinned + sum(self.macs.values()) * bits**2


def starting_mean(bitops: BitOps, budget: float, sigma: float) -> float:
    """The mu, alike for all layers, with which the expected BitOPs are `budget`; the nearest there is."""
    bits = torch.tensor(WIDTHS, dtype=torch.float64)

    def expected(mean: float) -> float:
        weights = (-(((bits - mean) / sigma) ** 2) / 2).softmax(0)
        return bitops.pinned + sum(bitops.macs.values()) * float(weights @ bits**2)

    low, high = WIDTHS[0] - 4.0, WIDTHS[-1] + 4.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < budget else (low, middle)
    return low


def fit_shifts(means: Tensor, macs: Sequence[int], budget: float) -> Tensor:
    """What to add to each layer's mu so that the nearest widths take `budget` on average, and hardly less.

    The likeliest widths need not cost what the distribution they come from does. One shift common to all layers is
    found by bisection, so that the budget is just not exceeded; what it leaves unused goes to single layers, those
    nearest to their next width first. Where few layers decide the same for all samples, every assignment is tried, and
    of those within 5 % below the budget the nearest to mu is taken.

    Args:
        means: [N, L], mu of each sample and layer.
        macs: of the L layers.
        budget: BitOPs that the L layers may take on average.

    Returns:
        [L], in bits.
    """
    means = means.double().cpu()
    counts = torch.tensor(macs, dtype=torch.float64)
    bits = torch.tensor(WIDTHS, dtype=torch.float64)
    layers = means.shape[1]
    if bool((means == means[0]).all()) and len(WIDTHS) ** layers <= EXHAUSTIVE_SEARCH:
        return _best_assignment(means[0], counts, budget) - means[0]
    # The lower of two widths that are equally near, as in `Policy.most_probable`.
    between = (bits[1:] + bits[:-1]) / 2

    def squares(shifted: Tensor) -> Tensor:
        return bits[torch.bucketize(shifted, between)] ** 2

    def common_cost(shift: float) -> float:
        return float((squares(means + shift) * counts).sum(1).mean())

    shift = _largest(common_cost, budget, float(bits[0] - means.max() - 1), float(bits[-1] - means.min() + 1))
    shifts = torch.full((layers,), shift, dtype=torch.float64)
    costs = squares(means + shifts).mean(0) * counts
    upper = torch.cat((between, torch.tensor([torch.inf], dtype=torch.float64)))
    distance = upper[torch.bucketize(means + shifts, between)] - (means + shifts)
    for layer in distance.amin(0).argsort().tolist():
        others = float(costs.sum() - costs[layer])

        def layer_cost(extra: float, layer: int = layer) -> float:
            return float(squares(means[:, layer] + shift + extra).mean() * counts[layer])

        shifts[layer] += _largest(layer_cost, budget - others, 0.0, LAYER_SHIFT)
        costs[layer] = layer_cost(float(shifts[layer]) - shift)
    return shifts + _centering(means + shifts)


def _centering(shifted: Tensor) -> Tensor:
    """What to add to a layer's shifted mu [N, L] where all samples take one width, so that mu lies around it: [L].

    The largest shift that the budget allows leaves mu just below the next width, and what moves it up ever so little,
    the next training step or other images, would cost more than the same movement down saves.
    """
    bits = torch.tensor(WIDTHS, dtype=torch.float64)
    between = (bits[1:] + bits[:-1]) / 2
    taken = torch.bucketize(shifted, between)
    low, high = shifted.amin(0), shifted.amax(0)
    half = (high - low) / 2
    edges = torch.cat((-torch.inf * torch.ones(1, dtype=torch.float64), between, torch.inf * torch.ones(1)))
    width = taken[0]
    centre = bits[width].maximum(edges[width] + half).minimum(edges[width + 1] - half)
    return torch.where((taken == width).all(0), centre - (low + high) / 2, 0.0)


def _largest(cost, budget: float, low: float, high: float) -> float:
    """The largest argument in [low, high] whose cost, which rises, is within the budget; `low` where none is."""
    if cost(high) <= budget:
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def _best_assignment(mean: Tensor, counts: Tensor, budget: float) -> Tensor:
    widths = torch.tensor(list(product(WIDTHS, repeat=len(mean))), dtype=torch.float64)
    costs = widths.square() @ counts
    # Rounding must not make an assignment that fits exactly one that does not.
    fits = costs <= budget * (1 + 1e-9)
    if not bool(fits.any()):
        return widths[costs.argmin()]
    near = fits & (costs >= (1 - BUDGET_TOLERANCE) * budget)
    if not bool(near.any()):
        return widths[costs.masked_fill(~fits, -1).argmax()]
    return widths[(widths - mean).square().sum(1).masked_fill(~near, torch.inf).argmin()]
