"""Networks: featurizers with DomainBed's semantics, their weights, and what can be asked of their layers."""

from domainbed_sfp.networks.factory import (
    SMALL_IMAGE_SIDE,
    backbone_name,
    is_pretrained,
    make_featurizer,
    without_weights,
)
from domainbed_sfp.networks.featurizer import Featurizer, ImageFeaturizer, make_classifier
from domainbed_sfp.networks.mnist_cnn import MNIST_CNN
from domainbed_sfp.networks.precision import channels_last_is_faster, has_depthwise_convolutions, set_precision

__all__ = [
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
