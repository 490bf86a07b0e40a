"""Folders of made images, and a short run on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

FOLDER_RUN = ("train", "--dataset", "Folder", "--data_dir", "tree", "--steps", 2, "--skip_model_save", "--output_dir", "run",
              "--hparams", '{"image_size": 16, "backbone": "mnist_cnn", "batch_size": 4}')  # fmt: skip


def make_tree(root: Path, environments=("a", "b", "c"), classes=("cat", "dog"), n=8, size=(24, 20)) -> Path:
    """A small set of images in folders; the class is visible in the colour."""
    rng = np.random.default_rng(0)
    for env_i, environment in enumerate(environments):
        for class_i, name in enumerate(classes):
            folder = root / environment / name
            folder.mkdir(parents=True)
            for index in range(n):
                pixels = rng.integers(0, 90, (size[1], size[0], 3))
                pixels[..., class_i % 3] += 120 + 10 * env_i
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root
