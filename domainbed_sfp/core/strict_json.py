"""JSON that others write: whatever is wrong with it is a ValueError, as is a name given twice where that matters."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str | bytes, **options: Any) -> Any:
    """What json.loads gives. Raises ValueError for a text that is no JSON, or is nested too deeply to be read."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of json.loads. Raises ValueError for a name that an object has twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"an object has one name twice: {name!r:.80}")
        found[name] = value
    return found
