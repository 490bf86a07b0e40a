"""Digits: MNIST as DomainBed makes it, and the embedded sets."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.sets import digits


def write_mnist(root: Path, n: int = 60, compressed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A made MNIST in idx format: n training and n // 2 test digits."""
    rng = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = [], []
    for half, count in (("train", n), ("t10k", n // 2)):
        x = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        y = rng.integers(0, 10, count, dtype=np.uint8)
        for name, array in ((f"{half}-images-idx3-ubyte", x), (f"{half}-labels-idx1-ubyte", y)):
            data = (
                struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            )
            if compressed:
                (raw / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (raw / name).write_bytes(data)
        images.append(x)
        labels.append(y)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("compressed", [True, False])
def test_colored_mnist_is_domainbeds(tmp_path, compressed):
    """Recomputed sample by sample from the definition, with torch's global generator in DomainBed's order."""
    images, labels = write_mnist(tmp_path, compressed=compressed)
    ours = get_dataset_class("ColoredMNIST").build(str(tmp_path), {}, 5, None)
    torch.manual_seed(5)
    order = torch.randperm(len(images))
    for env_i, flip in enumerate([0.1, 0.2, 0.9]):
        mine = order[env_i::3]
        noise, color_noise = torch.rand(len(mine)) < 0.25, torch.rand(len(mine)) < flip
        for position, index in enumerate(mine.tolist()):
            y = int(labels[index] < 5) ^ int(noise[position])
            color = y ^ int(color_noise[position])
            expected = torch.zeros(2, 28, 28)
            expected[color] = torch.from_numpy(images[index]).float() / 255
            assert torch.equal(ours[env_i].images[position], expected)
            assert ours[env_i].labels[position] == y
            assert ours[env_i].aligned[position] == (color == y)
    assert ours.input_shape == (2, 28, 28) and ours.num_classes == 2


def test_rotated_mnist_is_domainbeds(tmp_path):
    images, labels = write_mnist(tmp_path)
    ours = get_dataset_class("RotatedMNIST").build(str(tmp_path), {}, 3, None)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    for env_i, angle in enumerate([0, 15, 30, 45, 60, 75]):
        index = int(order[env_i::6][1])
        turned = transforms.functional.rotate(
            Image.fromarray(images[index]), angle, transforms.InterpolationMode.BILINEAR, fill=(0,)
        )
        assert torch.equal(ours[env_i].images[1], transforms.functional.to_tensor(turned))
        assert ours[env_i].labels[1] == labels[index]


def test_other_digits_are_told_from_mnist(tmp_path):
    write_mnist(tmp_path / "one")
    write_mnist(tmp_path / "two", n=61)
    ours = get_dataset_class("ColoredMNIST")
    told = ours.differences(str(tmp_path / "one"))
    assert "raw/train-images-idx3-ubyte.gz: not an idx file of 60000 x 28 x 28 bytes" in told
    assert "raw/t10k-labels-idx1-ubyte.gz: other labels" in told
    one, two = (ours.data_digest(str(tmp_path / name)) for name in ("one", "two"))
    assert one != two and len(one) == len(two) == 16
    assert get_dataset_class("ColoredDigits").data_digest(None) is None


def test_damaged_and_missing_mnist_files_are_named(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    flipped = bytes([*whole[:50], whole[50] ^ 255, *whole[51:]])
    for damaged in (whole[:100], flipped):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz.*damaged"):
            digits.read_mnist(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match=r"no t10k-images-idx3-ubyte.*download MNIST"):
        digits.read_mnist(str(tmp_path))


def test_embedded_digits_are_those_that_scikit_learn_loads():
    expected = load_digits()
    images, labels = digits.read_embedded(None)
    assert np.array_equal(images, np.round(expected.images * 255 / 16)) and np.array_equal(labels, expected.target)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("name", ["ColoredDigits", "FullColoredDigits", "RotatedDigits", "TexturedDigits"])
def test_embedded_sets_need_no_files(name):
    dataset = get_dataset_class(name).build(None, {}, 0, None)
    assert sum(len(env) for env in dataset.environments) == 1797
    again = get_dataset_class(name).build(None, {}, 0, None)
    other = get_dataset_class(name).build(None, {}, 1, None)
    assert torch.equal(dataset[0].images, again[0].images) and not torch.equal(dataset[0].images, other[0].images)


def test_colours_agree_as_often_as_they_should():
    dataset = get_dataset_class("FullColoredDigits").build(None, {}, 0, None)
    for env, agreement in zip(dataset.environments, [0.95, 0.9, 0.1]):
        assert env.aligned.float().mean().item() == pytest.approx(agreement, abs=0.04)
        # The colour of a sample is its brightest pixel's direction; aligned ones have their digit's.
        flat = env.images.flatten(2)
        peak = flat[torch.arange(len(flat)), :, flat.sum(1).argmax(1)]
        nearest = torch.cdist(
            peak / peak.norm(dim=1, keepdim=True), digits.PALETTE / digits.PALETTE.norm(dim=1, keepdim=True)
        ).argmin(1)
        assert torch.equal(nearest == env.labels, env.aligned)
    # Where it does not agree, the nine other colours are equally likely.
    env = get_dataset_class("FullColoredDigits").make(torch.full((20_000, 2, 2), 255, dtype=torch.uint8),
                                                      torch.zeros(20_000, dtype=torch.long), 0.1, torch.Generator().manual_seed(0))  # fmt: skip
    colors = torch.cdist(env[0][:, :, 0, 0], digits.PALETTE).argmin(1)
    assert torch.bincount(colors).float() / 20_000 == pytest.approx(torch.full((10,), 0.1), abs=0.01)


def test_stripes_are_told_apart_by_direction_and_frequency():
    """The strongest wave of each pattern, by Fourier transform, and its independence of the phase."""
    found = []
    for texture in range(10):
        pattern = digits.stripes(torch.full((2,), texture), torch.tensor([0.0, 0.3]), 64)
        assert pattern.min() >= 0 and pattern.max() <= 1 and not torch.allclose(pattern[0], pattern[1])
        spectrum = torch.fft.rfft2(pattern - pattern.mean((1, 2), keepdim=True)).abs().flatten(1).argmax(1)
        assert spectrum[0] == spectrum[1]
        found.append(int(spectrum[0]))
    assert len(set(found)) == 10


def test_textures_agree_as_often_as_they_should():
    dataset = get_dataset_class("TexturedDigits").build(None, {}, 0, None)
    assert dataset.input_shape == (1, 16, 16)
    patterns = digits.stripes(torch.arange(10).repeat_interleave(32), torch.arange(32).repeat(10) / 32, 16) - 0.5
    for env, agreement in zip(dataset.environments, [0.98, 0.95, 0.1]):
        assert env.aligned.float().mean().item() == pytest.approx(agreement, abs=0.03)
        # Where no ink is, the image is the pattern: the best match over phases is the sample's texture.
        x = env.images[:, 0]
        ink = x > 0.46
        score = torch.einsum("nhw,phw->np", torch.where(ink, 0.0, x - 0.225), patterns).view(len(x), 10, 32).amax(2)
        agrees = score.argmax(1) == env.labels
        assert (agrees == env.aligned).float().mean() > 0.9
