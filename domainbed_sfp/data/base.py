"""What a data set is: named environments of labelled images, and how the registry finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from domainbed_sfp.core.hparam import Hparam
from domainbed_sfp.core.registry import Registry, origin_of
from domainbed_sfp.data.images import augmentation

# Images a batch of an evaluation.
EVALUATION_BATCH = 256


class StoredImages(Protocol):
    """Photographs that are read when asked for: a memory map, or what makes them of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The images at `indices`: uint8 [n, H, W, 3]."""


@dataclass(frozen=True)
class Environment:
    """The samples of one environment.

    images: uint8 [N, H, W, 3] (photographs, usually a memory map) or float [N, C, H, W] (ready for the network).
    labels: int64 [N].
    training_images: the same photographs at a larger size, from which augmentation crops; None: from `images`.
    sizes: (width, height) of the original files, int [N, 2]; for photographs only, where crops are drawn from it.
    aligned: bool [N], where the data set knows whether a sample's spurious attribute agrees with its label.
    """

    name: str
    images: StoredImages | Tensor
    labels: Tensor
    training_images: StoredImages | None = None
    sizes: Tensor | None = None
    aligned: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_photographic(self) -> bool:
        return not isinstance(self.images, Tensor)

    def gather(self, indices: np.ndarray, for_crops: bool = False) -> Tensor:
        """The stored images at `indices` as a tensor [n, C, H, W]; uint8 where they are photographs, then at the
        larger size `for_crops`."""
        if not isinstance(self.images, Tensor):
            source = self.training_images if for_crops and self.training_images is not None else self.images
            # A permuted NHWC array is a channels_last tensor: no copy is needed to get there.
            return torch.from_numpy(source[indices]).permute(0, 3, 1, 2)
        return self.images[torch.from_numpy(indices)]


class Dataset:
    """Base of all data sets; class constants as in DomainBed.

    ENVIRONMENTS: names of the environments in table order; None where they are known only from the data.
    N_STEPS, CHECKPOINT_FREQ: a run's length and the steps between its checkpoints, unless a flag says otherwise.
    IMAGE_SIZE: side of the square input, pixels, unless hparam `image_size` says otherwise.
    SMALL_IMAGES: MNIST-like, trained from scratch: decides the ranges of lr, weight decay and batch size.
    EMBEDDED: needs no files.
    HPARAMS: hparams that runs on this data set have besides the usual, or in place of them.
    """

    ENVIRONMENTS: ClassVar[list[str] | None] = None
    N_STEPS: ClassVar[int] = 5001
    CHECKPOINT_FREQ: ClassVar[int] = 100
    IMAGE_SIZE: ClassVar[int] = 224
    SMALL_IMAGES: ClassVar[bool] = False
    EMBEDDED: ClassVar[bool] = False
    HPARAMS: ClassVar[Mapping[str, Hparam]] = {}

    environments: list[Environment]
    input_shape: tuple[int, int, int]
    num_classes: int

    @classmethod
    def build(cls, data_dir: str | None, hparams: Mapping[str, Any], seed: int, cache_dir: Path | None) -> Dataset:
        """Loads the data set.

        Args:
            data_dir: DomainBed's root of all data sets; may be None for embedded sets.
            hparams: `image_size` is used, `data_augmentation` by sets of photographs, and what HPARAMS names.
            seed: the run's `--seed`, which in DomainBed also decides how MNIST is dealt out and coloured.
            cache_dir: where decoded photographs are kept; None for the default place.

        Raises:
            UserError: if the files are missing, incomplete or unreadable.
        """
        raise TypeError(f"{cls.__name__} does not define build(data_dir, hparams, seed, cache_dir)")

    @classmethod
    def environment_names(cls, data_dir: str | None = None) -> list[str]:
        """Names of the environments, without loading any image."""
        if cls.ENVIRONMENTS is None:
            raise TypeError(f"{cls.__name__} defines neither ENVIRONMENTS nor environment_names(data_dir)")
        return cls.ENVIRONMENTS

    @classmethod
    def data_digest(cls, data_dir: str | None) -> str | None:
        """What tells one user's data from another's under the same name; None where the name says it all."""
        return None

    @classmethod
    def differences(cls, data_dir: str | None) -> list[str]:
        """Where the files differ from the published data set, in a few words each."""
        return []

    @classmethod
    def inspect(cls, data_dir: str | None) -> tuple[dict[str, int], list[str]]:
        """How many files and folders beside the data are no part of it, by reason (data.images.contents.REASONS); and
        what a user should know of the files before a run, a line each."""
        return {}, []

    @classmethod
    def check_files(cls, data_dir: str | None) -> None:
        """Raises UserError where files are missing or laid out in another way, without reading them."""

    def __init__(self, environments: list[Environment], num_classes: int, augment: bool = False) -> None:
        self.environments = environments
        self.num_classes = num_classes
        self.augment = augment
        first = environments[0].images
        height, width, channels = (
            first.shape[1:] if environments[0].is_photographic else (*first.shape[2:], first.shape[1])
        )
        self.input_shape = (int(channels), int(height), int(width))

    def __len__(self) -> int:
        return len(self.environments)

    def __getitem__(self, index: int) -> Environment:
        return self.environments[index]

    def evaluation_batches(
        self, env_i: int, device: torch.device, batch_size: int = EVALUATION_BATCH
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples of an environment in order, without augmentation: (x float [n, C, H, W], y [n])."""
        environment = self.environments[env_i]
        for start in range(0, len(environment), batch_size):
            indices = np.arange(start, min(start + batch_size, len(environment)))
            x = environment.gather(indices).to(device)
            y = environment.labels[start : start + batch_size].to(device)
            yield (augmentation.normalize(x) if environment.is_photographic else x), y


ClassT = TypeVar("ClassT", bound=type[Dataset])

DATASETS: Registry[type[Dataset]] = Registry("data set", "domainbed_sfp.data.sets", "datasets")


def dataset(name: str) -> Callable[[ClassT], ClassT]:
    """Class decorator: makes the class known as data set `name`."""

    def decorate(cls: ClassT) -> ClassT:
        DATASETS.add(name, cls, origin_of(cls))
        return cls

    return decorate


def get_dataset_class(name: str) -> type[Dataset]:
    """The class of data set `name`; a UserError with the nearest name if there is none."""
    return DATASETS.get(name)


def dataset_names() -> list[str]:
    """All data sets: embedded ones first."""
    return sorted(DATASETS.names(), key=lambda name: (not DATASETS.entries[name].EMBEDDED, name))


def not_as_published(dataset: str, differences: list[str]) -> str:
    """What a user should know of a data set's files that are not the published ones."""
    return (
        f"{dataset} is not the published data set: {', '.join(differences)}; records and tables say "
        "so, and the leaderboard does not take it"
    )
