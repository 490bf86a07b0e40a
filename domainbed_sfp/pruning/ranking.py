"""Rankings of a layer's channels: votes, the loss that teaches them, and how far two of them agree.

Scores are logits [N, C], a sample a row and a channel a column, the higher the better. A ranking is a permutation [C]
of channel numbers, best first. The loss is a mean over samples, divided by what equal scores cost, so that it begins
at 1 and compares across layers of any width; a layer of a single channel has nothing to rank and costs 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def list_mle(scores: Tensor, ranking: Tensor) -> Tensor:
    """ListMLE (Xia et al. 2008): -log of the ranking's probability under Plackett and Luce's model, over log(C!).

    Channels are drawn one after the other without replacement, with probabilities proportional to exp(score).
    """
    if len(ranking) < 2:
        return scores.new_zeros(())
    ordered = scores[:, ranking]
    remaining = ordered.flip(1).logcumsumexp(1).flip(1)
    return (remaining - ordered).sum(1).mean() / math.lgamma(len(ranking) + 1)


def ballots(scores: Tensor, kept: int) -> Tensor:
    """What every sample gives to every channel, 1 to each of its `kept` best: [N, C], float64. Of equal scores the
    channel that comes first is the better."""
    local = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.float64).scatter_(1, local[:, :kept], 1.0)


class RankingVote(nn.Module):
    """A vote of samples on the ranking of a layer's channels, in which every environment has the same weight.

    Counts, like the ranking that results, are buffers: a vote may be taken over several steps and interrupted.

    Args:
        environments: how many there are.
        channels: C.
    """

    given: Tensor
    attention: Tensor
    voters: Tensor
    ranking: Tensor

    def __init__(self, environments: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("given", torch.zeros(environments, channels, dtype=torch.float64))
        self.register_buffer("attention", torch.zeros(environments, channels, dtype=torch.float64))
        self.register_buffer("voters", torch.zeros(environments, dtype=torch.float64))
        self.register_buffer("ranking", torch.arange(channels))

    @torch.no_grad()
    def count(self, environment: int, given: Tensor, logits: Tensor) -> None:
        """Takes the ballots [N, C] of an environment's samples, and the logits [N, C] of their attention."""
        self.given[environment] += given.sum(0)
        self.attention[environment] += 2 * torch.sigmoid(logits.double()).sum(0)
        self.voters[environment] += len(given)

    @torch.no_grad()
    def close(self) -> None:
        """Makes `ranking` the outcome: by votes, ties by mean attention, then by position."""
        votes, attention = self.shares(), (self.attention / self.voters.clamp_min(1)[:, None]).mean(0)
        order = attention.argsort(descending=True, stable=True)
        self.ranking.copy_(order[votes[order].argsort(descending=True, stable=True)])

    def shares(self) -> Tensor:
        """The share of the votes that each channel has, [C], in [0, 1], float64."""
        # Rounded, since shares that add up to the same in another order differ in their last bits.
        return (self.given / self.voters.clamp_min(1)[:, None]).mean(0).round(decimals=9)


@torch.no_grad()
def kendall_tau(scores: Tensor, ranking: Tensor) -> Tensor:
    """Kendall's tau between each sample's order of the channels and `ranking`: [N], from -1 to 1.

    (pairs in the same order - pairs in the opposite one) / all pairs; a pair of equal scores is neither (tau-a).
    `ranking` may leave channels out: then it is about the others. NaN for fewer than two channels.

    By merge sort, all samples at once: while sorted runs are merged, each element counts how many of the run that
    stands before it in the ranking are above it and how many below.
    """
    samples, count = len(scores), len(ranking)
    if count < 2:
        return torch.full((samples,), torch.nan, device=scores.device)
    width = 1 << (count - 1).bit_length()
    # Padded behind the last one with scores below all others: a padded column agrees with the ranking.
    runs = F.pad(scores[:, ranking].float(), (0, width - count), value=-torch.inf)
    agreement = torch.full((samples,), -count * (width - count), device=scores.device)
    size = 1
    while size < width:
        pairs = runs.view(samples, -1, 2, size)
        before, after = pairs[:, :, 0].contiguous(), pairs[:, :, 1].contiguous()
        not_above = torch.searchsorted(before, after, right=True)
        below = torch.searchsorted(before, after)
        agreement += (size - not_above - below).sum((1, 2))
        size *= 2
        runs = runs.view(samples, -1, size).sort(dim=2).values
    return agreement / (count * (count - 1) / 2)


@torch.no_grad()
def top_k_overlap(scores: Tensor, ranking: Tensor, k: int) -> Tensor:
    """The fraction of the k best channels of `ranking` that are among a sample's own k best: [N]."""
    local = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.isin(local, ranking[:k]).float().mean(1)
