"""Photographs with a shortcut: a mark that is easier to see than the class, as hospital tags and frames are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import Hparam, one_of
from domainbed_sfp.data.attributes import draw_attribute
from domainbed_sfp.data.base import Dataset, Environment, StoredImages, dataset
from domainbed_sfp.data.sets.folders import PACS, ImageFolders

BLACK, WHITE, GREY, ORANGE = (0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 140, 0)
RED, YELLOW, GREEN, CYAN, BLUE, MAGENTA = (
    *((255, 0, 0), (255, 255, 0), (0, 255, 0)),
    *((0, 255, 255), (0, 0, 255), (255, 0, 255)),
)

# The two colours of a mark. DomainBed's augmentation turns the hues of an image by up to 108 degrees, all
# at once, and makes one image in ten grey: one colour says little then, how two of them differ is seen all the same.
MARKS = np.array(
    [
        *((RED, CYAN), (WHITE, BLACK), (BLUE, WHITE), (GREEN, BLACK), (MAGENTA, YELLOW)),
        *((BLACK, BLACK), (ORANGE, ORANGE), (GREY, WHITE), (CYAN, GREY), (RED, YELLOW)),
    ],
    dtype=np.uint8,
)

# Fractions of the side. Training crops keep at least 72 % of a side: a frame of this width is never cut off whole, and
# a sign this large seldom.
FRAME_WIDTH, FRAME_DASHES = 0.1, 8
SIGN_SIDE, SIGN_MARGIN = 0.3, 0.04
TINT_STRENGTH = 0.5
# Rec. 601.
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)

AGREEMENTS: tuple[float | None, ...] = (0.95, 0.9, None)


def mark_colors(classes: int) -> np.ndarray:
    """The colours of each class's mark, uint8 [classes, 4, 3]: one of MARKS twice, or two beyond ten classes.

    Raises ValueError for one class, or for more than there are pairs of marks.
    """
    if not 2 <= classes <= len(MARKS) ** 2:
        raise ValueError(f"expected 2 to {len(MARKS) ** 2} classes, a mark for each, found {classes}")
    first, second = np.arange(classes) % len(MARKS), np.arange(classes) // len(MARKS)
    return np.concatenate((MARKS[first], MARKS[first if classes <= len(MARKS) else second]), axis=1)


@functools.cache
def frame(side: int) -> np.ndarray:
    """Which of a mark's four colours a pixel has, int8 [side, side]: dashes of the first two in turn along the upper
    and lower edge, of the others along the sides; -1 where the image stays."""
    dash = np.arange(side) * FRAME_DASHES // side % 2
    width = max(1, round(FRAME_WIDTH * side))
    pattern = np.full((side, side), -1, dtype=np.int8)
    pattern[:, :width] = pattern[:, -width:] = dash[:, None] + 2
    pattern[:width] = pattern[-width:] = dash[None, :]
    return pattern


@functools.cache
def corner(side: int) -> np.ndarray:
    """As `frame`, a sign in the lower right corner, in it another: their upper halves have the first two colours, the
    lower halves the others."""
    pattern = np.full((side, side), -1, dtype=np.int8)
    end = side - round(SIGN_MARGIN * side)
    start = end - max(4, round(SIGN_SIDE * side))
    border = max(1, (end - start) // 4)
    pattern[start:end, start:end] = 0
    pattern[start + border : end - border, start + border : end - border] = 1
    pattern[(start + end) // 2 : end, start:end] += 2
    return pattern


def tint(images: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Images half of whose colour is the mark's: shadows take the first, lights the second; in the lower half of the
    image the third and the fourth."""
    light = (images @ LUMINANCE / 255)[..., None]
    rows = 2 * (np.arange(images.shape[1]) >= images.shape[1] // 2)
    dark, bright = (colors[:, rows + position, None].astype(np.float32) for position in (0, 1))
    toned = images + TINT_STRENGTH * (dark + light * (bright - dark) - images)
    return np.round(toned).astype(np.uint8)


PATTERNS = {"frame": frame, "corner": corner}
STAMPS = (*PATTERNS, "tint")


def stamp_images(images: np.ndarray, colors: np.ndarray, stamp: str) -> np.ndarray:
    """Copies of `images`, uint8 [n, side, side, 3], with marks of the `colors` [n, 4, 3] in the form of `stamp`, one of
    STAMPS."""
    if stamp == "tint":
        return tint(images, colors)
    pattern, images = PATTERNS[stamp](images.shape[1]), images.copy()
    for position in range(colors.shape[1]):
        images[:, pattern == position] = colors[:, None, position]
    return images


class StampedImages:
    """Photographs of several stores in an order of their own, stamped when they are read: no copy is kept.

    Args:
        stores: each uint8 [n, side, side, 3], of one side.
        rows: of each image, its position in the stores one after the other, int64 [N].
        colors: of each image's mark, uint8 [N, 4, 3].
        stamp: one of STAMPS.
    """

    def __init__(self, stores: Sequence[StoredImages], rows: np.ndarray, colors: np.ndarray, stamp: str) -> None:
        self.stores = stores
        self.ends = np.cumsum([store.shape[0] for store in stores])
        self.rows = rows
        self.colors = colors
        self.stamp = stamp

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.stores[0].shape[1:])

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        rows = self.rows[indices]
        images = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        owners = np.searchsorted(self.ends, rows, side="right")
        for position, store in enumerate(self.stores):
            mine = owners == position
            if mine.any():
                images[mine] = store[rows[mine] - self.ends[position] + store.shape[0]]
        return stamp_images(images, self.colors[indices], self.stamp)


class Stamped(Dataset):
    """Base: all photographs of a set dealt out at random to three environments, in which a mark agrees with the class
    in 95 % of the samples, in 90 %, and no more often than by chance.

    The mark is made on the decoded image, so that augmentation acts on it too; hparam `stamp` says what it is. The
    run's `--seed` deals the images out and draws the marks. Another set of photographs is stamped by

        @dataset("StampedMine")
        class StampedMine(Stamped):
            PHOTOGRAPHS = Mine
    """

    PHOTOGRAPHS: ClassVar[type[ImageFolders]]
    ENVIRONMENTS = ["95%", "90%", "chance"]
    CHECKPOINT_FREQ = 300
    HPARAMS = {
        "stamp": Hparam(
            "frame", doc="frame (dashed, around the image), corner (a sign) or tint (of all)", valid=one_of(*STAMPS)
        )
    }

    @classmethod
    def build(cls, data_dir: str | None, hparams: Mapping[str, Any], seed: int, cache_dir: Path | None) -> Dataset:
        domains, classes = cls.PHOTOGRAPHS.photographs(data_dir, hparams, cache_dir, one_crop_side=True)
        try:
            colors = mark_colors(classes)
        except ValueError as error:
            raise UserError(f"{cls.__name__}: {error}") from error
        labels = torch.cat([domain.labels for domain in domains])
        sizes = torch.cat([domain.sizes for domain in domains if domain.sizes is not None])
        small = [domain.images for domain in domains if not isinstance(domain.images, torch.Tensor)]
        large = [domain.training_images for domain in domains if domain.training_images is not None]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        environments = []
        for index, (name, agreement) in enumerate(zip(cls.environment_names(data_dir), AGREEMENTS)):
            rows = order[index :: len(AGREEMENTS)]
            marks, aligned = draw_attribute(labels[rows], agreement or 1 / classes, classes, generator)
            images, larger = (
                StampedImages(stores, rows.numpy(), colors[marks.numpy()], hparams["stamp"]) if stores else None
                for stores in (small, large)
            )
            assert images is not None
            environments.append(Environment(name, images, labels[rows], larger, sizes[rows], aligned))
        return cls(environments, classes, hparams["data_augmentation"])

    @classmethod
    def check_files(cls, data_dir: str | None) -> None:
        cls.PHOTOGRAPHS.check_files(data_dir)

    @classmethod
    def data_digest(cls, data_dir: str | None) -> str | None:
        return cls.PHOTOGRAPHS.data_digest(data_dir)

    @classmethod
    def differences(cls, data_dir: str | None) -> list[str]:
        return cls.PHOTOGRAPHS.differences(data_dir)

    @classmethod
    def inspect(cls, data_dir: str | None) -> tuple[dict[str, int], list[str]]:
        return cls.PHOTOGRAPHS.inspect(data_dir)


@dataset("StampedPACS")
class StampedPACS(Stamped):
    """PACS's images, all domains together, with a mark that agrees with the class in 95 and 90 percent of the samples
    and by chance (1/7)."""

    PHOTOGRAPHS = PACS
