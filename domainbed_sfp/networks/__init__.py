"""Networks: featurizers with DomainBed's semantics, their weights, and what can be asked of their layers."""

from domainbed_sfp.networks.factory import (
    BUILT_IN_BACKBONES,
    MNIST_CNN,
    SMALL_IMAGE_SIDE,
    Featurizer,
    ImageFeaturizer,
    backbone_name,
    channels_last_is_faster,
    has_depthwise_convolutions,
    is_pretrained,
    make_classifier,
    make_featurizer,
    set_precision,
    without_weights,
)

__all__ = [
    "BUILT_IN_BACKBONES",
    "MNIST_CNN",
    "SMALL_IMAGE_SIDE",
    "Featurizer",
    "ImageFeaturizer",
    "backbone_name",
    "channels_last_is_faster",
    "has_depthwise_convolutions",
    "is_pretrained",
    "make_classifier",
    "make_featurizer",
    "set_precision",
    "without_weights",
]
