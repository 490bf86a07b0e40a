"""GlobalPru on small images, and scores by hand."""

from __future__ import annotations

import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning.global_pru import GlobalPru
from domainbed_sfp.training import hparams


def make(dataset="FullColoredDigits", shape=(3, 8, 8), total=30, domains=2, name="GlobalPru", **overrides) -> GlobalPru:
    values = hparams.resolve_hparams(name, dataset, overrides=overrides)
    torch.manual_seed(0)
    algorithm = registry.get(name).make(shape, 4, domains, values)
    algorithm.total_steps = total
    return algorithm
