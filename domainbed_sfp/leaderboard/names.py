"""What a row may be called: nothing that readers take for another method, or for other settings.

The name of a registered algorithm is its own rows' alone, and they state beside it only settings that they have:
"SFP", "SFP (sparsity=0.7)". Any other name resembles no registered one, however it is spaced, spelled or dressed up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import combinations
from typing import Any

# Characters that are taken for letters at a glance; names have no others of that kind (see `entries.NAME`).
_ALIKE = str.maketrans("0134578i", "oleastbl")
# Pairs of letters that are.
_PAIRS = {"rn": "m", "vv": "w", "cl": "d"}
# What is put before or behind a name to make it look like a better one of the same.
_DRESS = (
    "a", "best", "better", "classic", "deep", "fast", "final", "fixed", "full", "improved", "long", "max", "mini", "my",
    "neo", "new", "next", "official", "orig", "original", "our", "ours", "plus", "plusplus", "pp", "pro", "pruner",
    "pruning", "real", "s", "star", "super", "the", "true", "tuned", "turbo", "ultra", "v", "x", "xl",
)  # fmt: skip
_STATED = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)\s*=\s*([^,()=]*)")


def wrong_name(
    name: str, algorithm: str, registered: Collection[str], settings: Mapping[str, Collection[Any]]
) -> tuple[str, str] | None:
    """What is expected of a row's name and what is found, None where it is right.

    Args:
        name: of the row, one that `entries.NAME` allows.
        algorithm: of the row.
        registered: names of algorithms.
        settings: by name, what the row's runs have; a setting in which they differ cannot be stated.
    """
    others = [one for one in registered if one != algorithm]
    if algorithm not in registered and (taken := {_folded(one): one for one in others}.get(_folded(algorithm))):
        return f"an algorithm whose name is not taken for that of {taken}", json.dumps(algorithm)
    own = re.fullmatch(re.escape(algorithm) + r"(?: \(([^()]+)\))?", name)
    if own is None and (taken := resembled(name, [*registered, algorithm])):
        if taken == algorithm:
            words = f"{algorithm}, alone or with settings as in '{algorithm} (sparsity=0.5)'"
            return f"{words}, or a name that is not taken for it", json.dumps(name)
        return f"a name that is not taken for that of algorithm {taken}", json.dumps(name)
    stated = dict(_STATED.findall(name))
    if own and own[1] is not None and ", ".join(f"{key}={value}" for key, value in stated.items()) != own[1]:
        return f"settings behind {algorithm}, as in '{algorithm} (sparsity=0.5)'", json.dumps(name)
    for key, value in stated.items():
        if key not in settings:
            return f"settings of its runs; {key} is none of them", json.dumps(name)
        if not all(_says(value.strip(), one) for one in settings[key]):
            values = sorted({_text(one) for one in settings[key]})
            return f"its own settings: {key}={' and '.join(values)[:80]}", json.dumps(name)
    return None


def _says(text: str, value: Any) -> bool:
    """Whether a text states a value; 8.0 and 8 are the same."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(text) == value
    return text == _text(value)


def _text(value: Any) -> str:
    """A value as the labels of tables have it."""
    return json.dumps(value, sort_keys=True).strip('"')


def resembled(name: str, registered: Collection[str]) -> str | None:
    """The registered name that a reader could take `name` for, None where there is none."""
    known = {_folded(one): one for one in registered}
    words = re.findall(r"[a-z0-9]+", name.casefold())
    stretches = sorted(combinations(range(len(words) + 1), 2), key=lambda pair: pair[0] - pair[1])
    forms = (_folded(bare) for begin, end in stretches for bare in _undressed("".join(words[begin:end])))
    return next((known[form] for form in forms if form in known), None)


def _undressed(text: str) -> list[str]:
    """A text alone, and without numbers behind it and a word of _DRESS at either end."""
    found = dict.fromkeys((text, re.sub(r"v?\d+$", "", text)))
    for part in list(found):
        found.update(dict.fromkeys(part.removesuffix(word) for word in _DRESS if part.endswith(word)))
    for part in list(found):
        found.update(dict.fromkeys(part.removeprefix(word) for word in _DRESS if part.startswith(word)))
    return list(found)


def _folded(text: str) -> str:
    """A text such that those that look alike are the same."""
    folded = "".join(re.findall("[a-z0-9]+", text.casefold())).translate(_ALIKE)
    for pair, letter in _PAIRS.items():
        folded = folded.replace(pair, letter)
    return folded
