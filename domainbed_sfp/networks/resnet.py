"""torchvision's ResNets without their classifiers."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import torch
from torch import nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.backbones import Request, backbone
from domainbed_sfp.networks.featurizer import ImageFeaturizer
from domainbed_sfp.networks.weights import adapt_input_channels, load_file


@backbone("resnet18")
def resnet18(request: Request) -> ImageFeaturizer:
    """512 features."""
    return _featurizer("resnet18", 512, request)


@backbone("resnet50")
def resnet50(request: Request) -> ImageFeaturizer:
    """2,048 features."""
    return _featurizer("resnet50", 2048, request)


def _featurizer(name: str, n_outputs: int, request: Request) -> ImageFeaturizer:
    network = _network(name, request.weights)
    adapt_input_channels(network, "conv1", request.input_shape[0])
    return ImageFeaturizer(network, n_outputs, request.freeze_bn, request.dropout)


def _network(name: str, weights: str) -> nn.Module:
    # Imported here because it takes as long as torch itself, and most commands build no ResNet.
    import torchvision.models

    build = getattr(torchvision.models, name)
    if weights == "imagenet":
        source = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            network = build(weights=source)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            target = Path(torch.hub.get_dir()) / "checkpoints"
            raise UserError(
                f"the ImageNet weights of {name} cannot be downloaded ({error}); put {Path(source.url).name} "
                f"(from {source.url}) into {target}, or give the file as hparam weights, or set weights to none"
            ) from error
    else:
        network = build(weights=None)
        if weights != "none":
            load_file(network, weights, name, ignore=("fc.",))
    network.fc = nn.Identity()
    return network
