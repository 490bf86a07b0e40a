"""DomainBed's network for MNIST-sized images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.networks.backbones import Request, backbone
from domainbed_sfp.networks.featurizer import Featurizer
from domainbed_sfp.networks.weights import load_file


class MNIST_CNN(Featurizer):
    """DomainBed's network for MNIST-sized images: four 3x3 convolutions with GroupNorm, global pooling.

    Module names are DomainBed's, so that its state dicts load. `batch_norm` puts BatchNorm in GroupNorm's place: there
    a channel can be taken out without moving its neighbours.
    """

    n_outputs = 128

    def __init__(self, input_shape: tuple[int, ...], batch_norm: bool = False) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if batch_norm else nn.GroupNorm(8, channels)

        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn0, self.bn1, self.bn2, self.bn3 = norm(64), norm(128), norm(128), norm(128)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))

    def features(self, x: Tensor) -> Tensor:
        x = self.bn0(F.relu(self.conv1(x)))
        x = self.bn1(F.relu(self.conv2(x)))
        x = self.bn2(F.relu(self.conv3(x)))
        x = self.bn3(F.relu(self.conv4(x)))
        return torch.flatten(self.avgpool(x), 1)


@backbone("mnist_cnn")
def mnist_cnn(request: Request) -> MNIST_CNN:
    """With GroupNorm, as DomainBed has it. ImageNet has no weights for it."""
    return _loaded(MNIST_CNN(request.input_shape), request.weights, "mnist_cnn")


@backbone("mnist_cnn_bn")
def mnist_cnn_bn(request: Request) -> MNIST_CNN:
    """With BatchNorm."""
    return _loaded(MNIST_CNN(request.input_shape, batch_norm=True), request.weights, "mnist_cnn_bn")


def _loaded(network: MNIST_CNN, weights: str, name: str) -> MNIST_CNN:
    if weights not in ("imagenet", "none"):
        load_file(network, weights, name)
    return network
