"""Reading files that others made with torch.save or safetensors: tensors and plain values, never code."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Training scripts save their arguments beside their weights; a Namespace is plain data.
torch.serialization.add_safe_globals([argparse.Namespace])

# What BatchNorm counts, which torch did not always save, and which nothing is computed from here.
COUNTER = "num_batches_tracked"

# Under which names checkpoints keep an average of the weights, which is the network meant for use (timm's order).
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")

# Checkpoints wrap a state dict in at most so many dictionaries.
_DEPTH = 4


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


def state_dict_for(contents: Any, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `contents` whose names are those of `expected`, as far as one is there.

    Training scripts wrap it (`state_dict`, `model`, an average of the weights, ...) and wrappers of networks prefix its
    names (`module.`, `backbone.`, ...): the part with the most names in common is taken, and of a prefixed one what
    has the prefix. Raises ValueError where there are no tensors by name.
    """
    candidates = list(_state_dicts(contents))
    if not candidates:
        kind = type(contents).__name__
        raise ValueError(f"it holds a {kind}" if not isinstance(contents, dict) else "it holds no tensors by name")
    found = []
    for is_average, state in candidates:
        # The PyPI package of EfficientNet-Lite0 writes its module names with a leading underscore.
        state = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()}
        for prefix in _prefixes(state, expected):
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            found.append((len(part.keys() & expected.keys()), is_average, part))
    return max(found, key=lambda entry: entry[:2])[2]


def _state_dicts(
    contents: Any, depth: int = _DEPTH, is_average: bool = False
) -> Iterator[tuple[bool, dict[str, Tensor]]]:
    """Every dictionary inside `contents` that has tensors by name, and whether it is an average of weights."""
    if not isinstance(contents, Mapping) or not depth:
        return
    tensors = {key: value for key, value in contents.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield is_average, tensors
    for key, value in contents.items():
        yield from _state_dicts(value, depth - 1, is_average or key in _AVERAGES)


def _prefixes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What names of `state` have in front of a name of `expected`; the empty prefix first."""
    prefixes = {"": 0}
    for name in expected:
        if not name.endswith(COUNTER):
            prefixes.update((key.removesuffix(name), 0) for key in state if key.endswith("." + name))
            break
    return list(prefixes)
