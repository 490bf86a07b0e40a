"""From hparams to a featurizer: which network they choose, and where its weights come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from domainbed_sfp.networks.backbones import BACKBONES, Request
from domainbed_sfp.networks.featurizer import Featurizer
from domainbed_sfp.networks.from_packages import timm_featurizer

# Up to this side DomainBed's hand-tuned MNIST network is the automatic choice.
SMALL_IMAGE_SIDE = 28

# False while weights are about to come from elsewhere: see `without_weights`.
_loads_weights: ContextVar[bool] = ContextVar("loads_weights", default=True)


def make_featurizer(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> Featurizer:
    """The featurizer that `hparams` choose for inputs of shape (channels, height, width).

    `backbone` "auto" follows DomainBed: MNIST_CNN for small images, else the ResNet that `resnet18` and
    `resnet50_augmix` select (the latter wins, as there). Raises UserError where a choice cannot be met.
    """
    name = backbone_name(input_shape, hparams)
    chosen = hparams.get("weights", "imagenet")
    request = Request(
        input_shape,
        weights=chosen if _loads_weights.get() else "none",
        is_pretrained=chosen != "none",
        freeze_bn=hparams.get("freeze_bn", False),
        dropout=hparams.get("resnet_dropout", 0.0),
    )
    return BACKBONES.get(name)(request) if name in BACKBONES else timm_featurizer(name, request)


def backbone_name(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> str:
    """The backbone that `hparams` choose for inputs of shape (channels, height, width), by name."""
    backbone = hparams.get("backbone", "auto")
    return _automatic_backbone(input_shape, hparams) if backbone == "auto" else backbone


def is_pretrained(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> bool:
    """Whether the featurizer of `hparams` starts from trained weights: ImageNet's, where it has any, or a file's."""
    weights = hparams.get("weights", "imagenet")
    if backbone_name(input_shape, hparams).startswith("mnist_cnn"):
        return weights not in ("imagenet", "none")
    return weights != "none"


@contextmanager
def without_weights() -> Iterator[None]:
    """While it lasts, featurizers are built as their hparams say, but with random weights: those that a checkpoint
    replaces need not be downloaded."""
    token = _loads_weights.set(False)
    try:
        yield
    finally:
        _loads_weights.reset(token)


def _automatic_backbone(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> str:
    if max(input_shape[1:]) <= SMALL_IMAGE_SIDE:
        return "mnist_cnn"
    if hparams["resnet50_augmix"]:
        return "timm:resnet50.ram_in1k"
    return "resnet18" if hparams["resnet18"] else "resnet50"
