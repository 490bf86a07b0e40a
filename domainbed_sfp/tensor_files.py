"""Reading files that others made with torch.save or safetensors: tensors and plain values, never code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """What a .safetensors file or, by any other suffix, a file of torch.save holds, on the CPU.

    Raises ValueError, which says why in a few words, for anything else; OSError where the file cannot be read.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"it is not a safetensors file ({error})") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch raises for bytes that are no pickle of its own can be anything
        # Torch's own text recommends to load code.
        foreign = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if foreign:
            raise ValueError(f"it holds more than tensors, {foreign[1]}, and no code is loaded from files") from error
        raise ValueError("it is not a file of torch.save") from error
