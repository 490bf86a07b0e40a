"""Files that `export` has written, whatever is in them.

import domainbed_sfp as dsfp

network = dsfp.load_exported("network.safetensors")
logits = network(images)  # [N, classes] of normalised images [N, C, H, W]
"""

from __future__ import annotations

import os

from safetensors import SafetensorError, safe_open
from torch import nn

from domainbed_sfp.deploy import exported, packed

# By the entry in the file's header.
READERS = {exported.HEADER: exported.load, packed.HEADER: packed.load}


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network of an exported file, pruned or quantized, on the CPU and in evaluation mode: images [N, C, H, W] to
    logits [N, classes]. Nothing of training is imported for it, and nothing in the file is executed.

    Raises UserError if the file cannot be read, is no export, or does not fit this version of its backbone.
    """
    return READERS.get(_header(path), exported.load)(path)


def _header(path: str | os.PathLike[str]) -> str:
    """Which of READERS a file belongs to; empty where it cannot be read, which any of them explains."""
    try:
        with safe_open(path, framework="pt") as file:
            return next(iter(READERS.keys() & (file.metadata() or {}).keys()), "")
    except (OSError, SafetensorError):
        return ""
