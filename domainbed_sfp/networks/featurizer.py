"""What every network is here: a featurizer, images to features, with DomainBed's semantics.

Images arrive normalised with ImageNet's mean and standard deviation, as DomainBed's loaders give them; a
backbone trained with another input scaling converts on its own, so that it also works on DomainBed's loaders.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD
from domainbed_sfp.networks.folding import Folding

# (mean, std) of inputs, a number per channel.
Scaling = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET_SCALING: Scaling = (IMAGENET_MEAN, IMAGENET_STD)


class Featurizer(nn.Module):
    """Base of all featurizers: `features` maps images [N, C, H, W] to features [N, n_outputs].

    `forward` runs it in the chosen precision and memory format and always returns float32, so that losses and
    penalties are computed in full precision whatever the network's arithmetic is.
    """

    n_outputs: int
    precision = "fp32"
    channels_last = False

    def features(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define features(x)")

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.precision == "fp32":
            return self.features(x)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = self.features(x)
        return out.float()


class ImageFeaturizer(Featurizer):
    """A backbone without its classifier, with DomainBed's `freeze_bn` and dropout.

    Args:
        network: maps images [N, 3, H, W] to features [N, n_outputs].
        scaling: (mean, std) of the inputs the backbone was trained with, channel by channel.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        n_outputs: int,
        freeze_bn: bool,
        dropout: float,
        scaling: Scaling = IMAGENET_SCALING,
    ) -> None:
        super().__init__()
        self.network = network
        self.n_outputs = n_outputs
        self.frozen = freeze_bn
        self.folding = Folding()
        self.dropout = nn.Dropout(dropout)
        self.rescale = scaling != IMAGENET_SCALING
        if self.rescale:
            mean, std, our_mean, our_std = (
                torch.tensor(part).view(1, -1, 1, 1) for part in (*scaling, IMAGENET_MEAN, IMAGENET_STD)
            )
            self.register_buffer("input_scale", our_std / std, persistent=False)
            self.register_buffer("input_shift", (our_mean - mean) / std, persistent=False)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        # In bf16 other roundings would decide about images that lie on a border.
        is_inference = not self.training and not torch.is_grad_enabled() and self.precision == "fp32"
        with self.folding.applied(self.network) if self.frozen or is_inference else nullcontext():
            return super().forward(x)

    def features(self, x: Tensor) -> Tensor:
        if self.rescale:
            x = x * self.input_scale + self.input_shift
        return self.dropout(self.network(x))

    def train(self, mode: bool = True) -> ImageFeaturizer:
        super().train(mode)
        if self.frozen:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def make_classifier(in_features: int, out_features: int, is_nonlinear: bool = False) -> nn.Module:
    """A linear classifier, or DomainBed's three-layer one."""
    if not is_nonlinear:
        return nn.Linear(in_features, out_features)
    return nn.Sequential(
        nn.Linear(in_features, in_features // 2),
        nn.ReLU(),
        nn.Linear(in_features // 2, in_features // 4),
        nn.ReLU(),
        nn.Linear(in_features // 4, out_features),
    )
