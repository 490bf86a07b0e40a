"""Records without paths of their author's machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# How a path begins that says where on its author's machine something lies: from the root, a home, a folder above, a
# drive, a server. "hf_hub:timm/resnet50.a1_in1k" is a network's name.
_PLACE = re.compile(r"(/|~|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\|file:)", re.IGNORECASE)
# What hparam weights may be that is no file.
WEIGHTS = ("imagenet", "none")


def without_places(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hparams without paths of a machine: a file goes by its name alone, as "./NAME", which no word stands for."""
    return {
        name: f"./{_file_name(value)}" if isinstance(value, str) and _is_place(name, value) else value
        for name, value in hparams.items()
    }


def _is_place(name: str, value: str) -> bool:
    return bool(_PLACE.match(value)) or (name == "weights" and value not in WEIGHTS)


def _file_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder"
