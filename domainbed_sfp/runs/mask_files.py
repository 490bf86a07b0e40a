"""Masks on disk: safetensors files that hold one bit a weight and are named by what they hold."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically

FOLDER = "masks"
SUFFIX = ".safetensors"

# In the header of a file: every mask's shape, as JSON.
_SHAPES = "shapes"


def pack(masks: Mapping[str, Tensor]) -> bytes:
    """Bool masks by name as a safetensors file: uint8 [ceil(n / 8)] a mask of n weights, first weight in the highest
    bit, and the shapes as JSON in the header."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    packed = {name: np.packbits(mask.cpu().numpy().reshape(-1)) for name, mask in masks.items()}
    return save(packed, metadata={_SHAPES: json.dumps(shapes, sort_keys=True)})


def unpack(data: bytes) -> dict[str, Tensor]:
    """The masks of a file that `pack` made. Raises UserError, saying what is wrong, for any other bytes."""
    try:
        packed = load(data)
        length = int.from_bytes(data[:8], "little")
        shapes = strict_json.parse(strict_json.parse(data[8 : 8 + length])["__metadata__"][_SHAPES])
        if not isinstance(shapes, dict) or set(shapes) != set(packed):
            raise ValueError(f"{_SHAPES} does not name the same masks as the file holds")
        masks = {}
        for name, shape in shapes.items():
            if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
                raise ValueError(f"shape {shape!r} of {name!r}")
            count, bits = math.prod(shape), packed[name]
            if bits.dtype != np.uint8 or bits.shape != ((count + 7) // 8,):
                raise ValueError(f"{name!r} is {bits.dtype} {bits.shape}, which is not one bit for each of {shape}")
            flat = np.unpackbits(bits)
            if flat[count:].any():
                raise ValueError(f"{name!r} has bits behind its last weight")
            masks[name] = torch.from_numpy(flat[:count].astype(bool)).view(shape)
        return masks
    except Exception as error:  # a file from elsewhere can be wrong in any way
        raise UserError(f"not a file of masks ({type(error).__name__}: {error})") from None


def digest(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of the masks' names, shapes and bits; what a file is called."""
    total = hashlib.sha256()
    for name in sorted(masks):
        total.update(json.dumps([name, list(masks[name].shape)]).encode())
        total.update(np.packbits(masks[name].cpu().numpy().reshape(-1)).tobytes())
    return total.hexdigest()


def keep(folder: Path, masks: Mapping[str, Tensor]) -> str:
    """Writes the masks into `folder` unless they are there already; returns their digest."""
    name = digest(masks)
    file = folder / (name + SUFFIX)
    if not file.exists():
        folder.mkdir(exist_ok=True)
        write_atomically(file, pack(masks))
    return name
