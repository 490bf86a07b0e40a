"""JSON of strangers: only what every reader can hold is read."""

from __future__ import annotations

import json
import math
from typing import Any

from domainbed_sfp.core.strict_json import unique_names
from domainbed_sfp.leaderboard.documents.problems import SHOWN

# Nothing that is written here is nested deeper than this; python's own limit is met in the midst of something else.
DEEPEST = 50
# A whole number beyond this is no count, seed or hparam, and none that every reader can hold.
LARGEST_INTEGER = 2**63 - 1


def parse(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError for anything else: NaN, infinity, a whole number beyond
    LARGEST_INTEGER, a name that an object has twice, too deep a nesting, half a character (a lone surrogate, which no
    file can hold)."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name[:SHOWN]} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else constant(text)

    def bounded(text: str) -> int:
        digits = len(text.lstrip("-"))
        if digits > len(str(LARGEST_INTEGER)) or abs(int(text)) > LARGEST_INTEGER:
            raise ValueError(f"a whole number of {digits:,} digits, at most {LARGEST_INTEGER:,} can be one")
        return int(text)

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=constant,
            parse_float=finite,
            parse_int=bounded,
            object_pairs_hook=unique_names,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _refuse_unusable(value)
    return value


def _refuse_unusable(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [*one, *one.values()]
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and any("\ud800" <= char <= "\udfff" for char in one):
                raise ValueError("a text with half a character (a lone surrogate)")
        level, depth = inner, depth + 1
