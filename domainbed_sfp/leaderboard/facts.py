"""What is known of a data set without its files: enough to tell numbers that it cannot give."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.download.verify import MNIST_FILES, image_tree
from domainbed_sfp.data.sets.digits import Digits
from domainbed_sfp.data.sets.stamped import Stamped

# Training set and test set of MNIST.
MNIST_DIGITS = sum(file.dimensions[0] for name, file in MNIST_FILES.items() if "images" in name)


@dataclass(frozen=True)
class Facts:
    """environments: names in their order. sizes: samples of each, None where they are not published. classes: their
    number. channels: of an image, whose side is an hparam. hparams: those that decide what the images show, and the
    values with which runs are compared."""

    environments: tuple[str, ...]
    sizes: tuple[int | None, ...]
    classes: int
    channels: int
    hparams: Mapping[str, Any] = field(default_factory=dict)


@functools.cache
def facts_of(dataset: str) -> Facts | None:
    """The facts of a registered data set, None where it is a user's own. Raises UserError for an unknown name."""
    cls = get_dataset_class(dataset)
    if issubclass(cls, Digits):
        names = tuple(cls.environment_names())
        total = len(cls.read(None)[0]) if cls.EMBEDDED else MNIST_DIGITS
        images, labels = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1)
        made, _, _ = cls.make(images, labels.long(), cls.SETTINGS[0], torch.Generator())
        return Facts(names, _dealt(total, len(names)), cls.CLASSES, made.shape[1])
    if issubclass(cls, Stamped):
        names, tree = tuple(cls.environment_names()), image_tree(cls.PHOTOGRAPHS.__name__)
        total = sum(count or 0 for count in tree.domain_images.values()) if tree else 0
        if tree is None or None in tree.domain_images.values():
            return None
        stamp = {"stamp": cls.HPARAMS["stamp"].default}
        return Facts(names, _dealt(total, len(names)), len(tree.classes), 3, stamp)
    tree = image_tree(dataset)
    if tree is not None:
        names = tuple(sorted(tree.domain_images))
        return Facts(names, tuple(tree.domain_images[name] for name in names), len(tree.classes), 3)
    return None


def _dealt(total: int, environments: int) -> tuple[int, ...]:
    """Sizes of environments to which `total` samples are dealt out in turn."""
    return tuple(len(range(index, total, environments)) for index in range(environments))


def split_sizes(size: int, is_test: bool, holdout_fraction: float, uda_holdout_fraction: float) -> dict[str, int]:
    """Samples of the splits of an environment, by the name they have in a record; see `data.splits`."""
    out = int(size * holdout_fraction)
    in_ = size - out
    uda = int(in_ * uda_holdout_fraction) if is_test else 0
    return {"in": in_ - uda, "out": out, "uda": uda}
