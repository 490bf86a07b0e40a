"""The networks that hparam `backbone` can name: one file for each of ours, others from packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TypeVar

from domainbed_sfp.core.registry import Registry, origin_of
from domainbed_sfp.networks.featurizer import Featurizer


@dataclass(frozen=True)
class Request:
    """What a backbone is asked for.

    input_shape: (channels, height, width). weights: "imagenet", "none" or the path of a file. is_pretrained: False
    where no weights are asked for; True also where a checkpoint is about to bring them. freeze_bn, dropout: see
    `featurizer.ImageFeaturizer`.
    """

    input_shape: tuple[int, ...]
    weights: str
    is_pretrained: bool
    freeze_bn: bool
    dropout: float


Builder = Callable[[Request], Featurizer]
BuilderT = TypeVar("BuilderT", bound=Builder)


def _declared(entry: EntryPoint) -> Builder:
    from domainbed_sfp.networks.from_packages import declared_featurizer

    return lambda request: declared_featurizer(entry, request)


BACKBONES: Registry[Builder] = Registry("backbone", "domainbed_sfp.networks", "backbones", _declared)


def backbone(name: str) -> Callable[[BuilderT], BuilderT]:
    """Decorator of a function that builds the featurizer of backbone `name`."""

    def decorate(build: BuilderT) -> BuilderT:
        BACKBONES.add(name, build, origin_of(build))
        return build

    return decorate
