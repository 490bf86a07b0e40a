"""BatchNorm statistics of a network that pruning has just changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def recalibrate_batchnorm(network: nn.Module, forward: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> None:
    """Replaces the running statistics of every training BatchNorm in `network` by their averages over `batches`.

    Weights taken out shift what later layers see, and running averages follow only slowly. BatchNorm that is in
    evaluation mode (`freeze_bn`) is left alone: its statistics are part of the weights. `forward` runs the network on a
    batch of images [N, C, H, W].
    """
    layers = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average over all batches
    for batch in batches:
        forward(batch)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
