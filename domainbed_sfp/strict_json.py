"""JSON that people write: a name that is given twice is an error, where python's own parser keeps the last."""

from __future__ import annotations

from typing import Any


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of json.loads. Raises ValueError for a name that an object has twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"an object has one name twice: {name!r:.80}")
        found[name] = value
    return found
