"""Handwritten digits, rotated or coloured: MNIST as DomainBed makes it, and scikit-learn's digits, which every
installation has (1,797 real 8 x 8 digits of the UCI set).

`--seed` decides how the digits are dealt out to the environments, which labels are flipped and how they are
coloured, through torch's generator in DomainBed's order: the same seed gives DomainBed's data, bit by bit.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.attributes import bernoulli, draw_attribute
from domainbed_sfp.data.base import Dataset, Environment, dataset
from domainbed_sfp.data.download import verify

# Ten colours far apart in hue and lightness; position is the digit a colour goes with.
PALETTE = torch.tensor(
    [
        [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0],
        [0.0, 1.0, 1.0], [1.0, 0.5, 0.0], [0.5, 0.0, 1.0], [0.6, 0.6, 0.6], [0.6, 0.3, 0.1],
    ]
)  # fmt: skip


def color_two_classes(
    images: Tensor, digits: Tensor, flip: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """ColoredMNIST's environment (Arjovsky et al. 2019): y = 1 for digits below 5, flipped with probability .25;
    the colour equals y, flipped with probability `flip`.

    Args:
        images: float [N, H, W] in [0, 1].

    Returns:
        images [N, 2, H, W], one channel a colour; labels [N]; which colours agree with the label [N].
    """
    labels = (digits < 5).float()
    labels = (labels - bernoulli(0.25, len(labels), generator)).abs()
    colors = (labels - bernoulli(flip, len(labels), generator)).abs()
    x = torch.stack([images, images], dim=1)
    x[torch.arange(len(x)), (1 - colors).long()] = 0
    return x, labels.long(), colors == labels


def color_ten_classes(
    images: Tensor, digits: Tensor, agreement: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Ten digits in ten colours: a sample has its digit's colour with probability `agreement`, else one of the nine
    others at random. At .1 colour and digit are independent.

    Returns:
        images [N, 3, H, W]; labels [N]; which colours agree with the label [N].
    """
    colors, aligned = draw_attribute(digits, agreement, 10, generator)
    return images[:, None] * PALETTE[colors][:, :, None, None], digits.long(), aligned


def stripes(texture: Tensor, phase: Tensor, side: int) -> Tensor:
    """Stripe patterns [N, side, side] in [0, 1]: texture 0..9 is one of five orientations at one of two frequencies
    (2 or 4 waves a side), phase [N] is in waves."""
    angle = (texture % 5) * (math.pi / 5)
    waves = torch.where(texture < 5, 2.0, 4.0)
    axis = torch.arange(side) / side
    cos, sin, waves, phase = (value[:, None, None] for value in (torch.cos(angle), torch.sin(angle), waves, phase))
    along = cos * axis[None, None, :] + sin * axis[None, :, None]
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (waves * along + phase))


def texture_ten_classes(
    images: Tensor, digits: Tensor, agreement: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Ten digits before ten stripe patterns: a sample has its digit's pattern with probability `agreement`, else one of
    the nine others; the pattern fills the background at .45 of full intensity, with a random phase. Unlike a colour the
    attribute is no axis of the input.

    Args:
        images: float [N, H, W] in [0, 1].

    Returns:
        images [N, 1, H, W]; labels [N]; which patterns agree with the label [N].
    """
    texture, aligned = draw_attribute(digits, agreement, 10, generator)
    background = stripes(texture, torch.rand(len(digits), generator=generator), images.shape[-1])
    return (images + (1 - images) * 0.45 * background)[:, None], digits.long(), aligned


def resize(images: Tensor, side: int) -> Tensor:
    """Grey images, uint8 [N, H, W], averaged over the area of each new pixel: uint8 [N, side, side]."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images[:, None].float(), (side, side), mode="area")[:, 0].round().to(torch.uint8)


def rotate(images: Tensor, angle: float) -> Tensor:
    """Grey images, uint8 [N, H, W], rotated by `angle` degrees with PIL's bilinear filter: float [N, 1, H, W]."""
    turned = [
        np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR, fillcolor=0))
        for image in images.numpy()
    ]
    return torch.from_numpy(np.stack(turned))[:, None].float().div(255)


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes (LeCun's format), gzipped or not. Raises UserError where it is damaged."""
    data = _unpacked(path)
    try:
        zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        if zeros or kind != 8:
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, struct.error) as error:
        raise UserError(f"MNIST file {str(path)!r} is damaged: {error}") from error


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"MNIST file {str(path)!r} is damaged: {error}") from error


MNIST_FILES = ("images-idx3-ubyte", "labels-idx1-ubyte")


def find_mnist(data_dir: str | None) -> dict[str, list[Path]]:
    """The files of MNIST, training set first, by what they hold. Raises UserError for one that is missing."""
    if data_dir is None:
        raise UserError("MNIST needs --data_dir: the folder that holds MNIST/raw")
    raw = Path(data_dir) / "MNIST" / "raw"
    files: dict[str, list[Path]] = {kind: [] for kind in MNIST_FILES}
    for half in ("train", "t10k"):
        for kind in MNIST_FILES:
            found = [path for path in (raw / f"{half}-{kind}", raw / f"{half}-{kind}.gz") if path.is_file()]
            if not found:
                raise UserError(
                    f"MNIST: there is no {half}-{kind}(.gz) in {str(raw)!r}; "
                    f"get it with: domainbed-sfp download MNIST --data_dir {data_dir}"
                )
            files[kind].append(found[0])
    return files


def read_mnist(data_dir: str | None) -> tuple[Tensor, Tensor]:
    """The 70,000 digits, training set first: uint8 [N, 28, 28] and labels [N]."""
    arrays = {kind: np.concatenate([read_idx(path) for path in paths]) for kind, paths in find_mnist(data_dir).items()}
    images, labels = (torch.from_numpy(arrays[kind]) for kind in MNIST_FILES)
    if len(images) != len(labels):
        raise UserError(f"MNIST in {data_dir!r}: {len(images)} images but {len(labels)} labels")
    return images, labels.long()


def unlike_mnist(data_dir: str | None) -> list[str]:
    """Which files are not MNIST's, by their dimensions and, to tell sets of the same form apart, by their labels; the
    images are not unpacked for it."""
    images, labels = find_mnist(data_dir).values()
    differences = verify.folder_problems(verify.MNIST_FOLDER, images[0].parents[1])
    for path in labels:
        if hashlib.md5(_unpacked(path)).hexdigest() != verify.MNIST_FILES[path.name.removesuffix(".gz")].md5:
            differences.append(f"raw/{path.name}: other labels")
    return differences


@functools.cache
def read_embedded(data_dir: str | None) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: uint8 [1797, 8, 8] (their 17 grey levels spread over 0..255) and labels [1797]. Parsed
    once a process: not to be changed in place."""
    # What `sklearn.datasets.load_digits` reads. To import that takes every process longer than a short run's training.
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", np.uint8, delimiter=",")
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return torch.from_numpy(images), torch.from_numpy(table[:, -1]).long()


class Digits(Dataset):
    """Base: digits dealt out to the environments in turn after a shuffle, each environment made by `make`.

    SETTINGS: what `make` gets for each environment: a flip probability, an agreement or an angle.
    """

    SMALL_IMAGES = True
    IMAGE_SIZE = 28
    SETTINGS: ClassVar[list[float]]
    CLASSES: ClassVar[int] = 10

    @staticmethod
    def read(data_dir: str | None) -> tuple[Tensor, Tensor]:
        """The digits: uint8 [N, H, W] and labels [N]."""
        return read_mnist(data_dir)

    @classmethod
    def make(
        cls, images: Tensor, digits: Tensor, setting: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x float [N, C, H, W], labels [N], aligned [N] or None) from uint8 images [N, H, W]."""
        raise TypeError(f"{cls.__name__} does not define make(images, digits, setting, generator)")

    @classmethod
    def check_files(cls, data_dir: str | None) -> None:
        if not cls.EMBEDDED:
            find_mnist(data_dir)

    @classmethod
    def data_digest(cls, data_dir: str | None) -> str | None:
        """Of what the files hold where they are not MNIST's."""
        if not cls.differences(data_dir):
            return None
        files = [path for paths in find_mnist(data_dir).values() for path in paths]
        return hashlib.sha256(b"".join(hashlib.sha256(_unpacked(path)).digest() for path in files)).hexdigest()[:16]

    @classmethod
    def differences(cls, data_dir: str | None) -> list[str]:
        return [] if cls.EMBEDDED else unlike_mnist(data_dir)

    @classmethod
    def build(cls, data_dir: str | None, hparams: Mapping[str, Any], seed: int, cache_dir: Path | None) -> Dataset:
        images, digits = cls.read(data_dir)
        images = resize(images, hparams.get("image_size", cls.IMAGE_SIZE))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        images, digits = images[order], digits[order]
        environments = []
        names = cls.environment_names(data_dir)
        for index, (name, setting) in enumerate(zip(names, cls.SETTINGS)):
            x, y, aligned = cls.make(images[index :: len(names)], digits[index :: len(names)], setting, generator)
            environments.append(Environment(name, x, y, aligned=aligned))
        return cls(environments, cls.CLASSES)


@dataset("ColoredMNIST")
class ColoredMNIST(Digits):
    """Arjovsky et al. 2019 in DomainBed's version (28 x 28, two channels): colour agrees with the noisy label in
    90, 80 and 10 percent of the samples."""

    ENVIRONMENTS = ["+90%", "+80%", "-90%"]
    SETTINGS = [0.1, 0.2, 0.9]
    CLASSES = 2

    @classmethod
    def make(
        cls, images: Tensor, digits: Tensor, setting: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return color_two_classes(images.float().div(255), digits, setting, generator)


@dataset("RotatedMNIST")
class RotatedMNIST(Digits):
    """Ghifary et al. 2015 in DomainBed's version: digits rotated by 0 to 75 degrees."""

    ENVIRONMENTS = ["0", "15", "30", "45", "60", "75"]
    SETTINGS = [0, 15, 30, 45, 60, 75]

    @classmethod
    def make(
        cls, images: Tensor, digits: Tensor, setting: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return rotate(images, setting), digits, None


@dataset("FullColoredMNIST")
class FullColoredMNIST(Digits):
    """Ten digits in ten colours that agree in 95, 90 and 10 percent of the samples (10: independent)."""

    ENVIRONMENTS = ["95%", "90%", "10%"]
    SETTINGS = [0.95, 0.9, 0.1]

    @classmethod
    def make(
        cls, images: Tensor, digits: Tensor, setting: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return color_ten_classes(images.float().div(255), digits, setting, generator)


@dataset("TexturedMNIST")
class TexturedMNIST(Digits):
    """MNIST at 14 x 14, ten digits before ten stripe patterns that agree in 98, 95 and 10 percent of the samples (10:
    independent). The spurious attribute is no axis of the input."""

    ENVIRONMENTS = ["98%", "95%", "10%"]
    SETTINGS = [0.98, 0.95, 0.1]
    IMAGE_SIZE = 14

    @classmethod
    def make(
        cls, images: Tensor, digits: Tensor, setting: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return texture_ten_classes(images.float().div(255), digits, setting, generator)


class EmbeddedDigits(Digits):
    """Base of the sets made from scikit-learn's digits: short runs on small images."""

    EMBEDDED = True
    IMAGE_SIZE = 8
    N_STEPS = 1001

    @staticmethod
    def read(data_dir: str | None) -> tuple[Tensor, Tensor]:
        return read_embedded(data_dir)


@dataset("ColoredDigits")
class ColoredDigits(EmbeddedDigits, ColoredMNIST):
    """ColoredMNIST's recipe on scikit-learn's digits."""


@dataset("RotatedDigits")
class RotatedDigits(EmbeddedDigits, RotatedMNIST):
    """RotatedMNIST's recipe on scikit-learn's digits."""


@dataset("FullColoredDigits")
class FullColoredDigits(EmbeddedDigits, FullColoredMNIST):
    """FullColoredMNIST's recipe on scikit-learn's digits."""


@dataset("TexturedDigits")
class TexturedDigits(EmbeddedDigits, TexturedMNIST):
    """TexturedMNIST's recipe on scikit-learn's digits, enlarged to 16 x 16."""

    IMAGE_SIZE = 16
