"""SFP on random batches."""

from __future__ import annotations

import torch
from torch import nn

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.sfp.algorithm import SFP
from domainbed_sfp.data.loaders import Minibatch
from domainbed_sfp.training import hparams


def make(name="SFP", total=20, **overrides) -> SFP:
    values = hparams.resolve_hparams(name, "FullColoredDigits", overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).make((3, 8, 8), 4, 2, values)
    algorithm.total_steps = total
    return algorithm


def flag(algorithm, losses, batches):
    """The flags and numbers to log for a reference whose loss on sample i of each domain is `losses[i]`."""
    return algorithm.flagging.flag(FixedLogits(losses)(torch.cat([x for x, _ in batches])), batches)


def batch(n=8, aligned=True, side=8):
    x, y = torch.randn(n, 3, side, side), torch.arange(n) % 4
    return Minibatch(x, y, torch.arange(n) % 3 > 0 if aligned else None)


def train(algorithm, end, begin=0, side=8):
    for step in range(begin, end):
        torch.manual_seed(step)
        algorithm.update([batch(side=side), batch(side=side)])


class FixedLogits(nn.Module):
    """A reference whose loss on sample i of each domain is `losses[i]`."""

    def __init__(self, losses):
        super().__init__()
        self.p = torch.exp(-torch.tensor(losses))

    def forward(self, x):
        logits = torch.full((len(x), 4), -50.0)
        for i in range(len(x)):
            p = self.p[i % len(self.p)]
            logits[i, i % 4] = torch.log(p)
            logits[i, (i + 1) % 4] = torch.log(1 - p)
        return logits
