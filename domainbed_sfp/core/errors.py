"""Errors that are the user's to mend, told in one line each."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints the message as one line and exits with status 2."""


# Larger whole numbers do not fit into 64 bits, nor into what torch and numpy count with.
LARGEST = 2**63 - 1


def check_range(name: str, value: int | None, least: int, most: int = LARGEST) -> None:
    """Raises UserError unless `value` is None or from `least` to `most`; `name` is the flag's or the key's."""
    if value is not None and not least <= value <= most:
        words = f"at least {least}" if value < least else f"at most {most}"
        raise UserError(f"{name}: expected a whole number of {words}, got {value}")


def did_you_mean(given: object, valid: Iterable[object]) -> str:
    """ "; did you mean 'NAME'?" for the name nearest to `given`; empty where none is near."""
    by_lower = {str(name).lower(): str(name) for name in valid}
    near = difflib.get_close_matches(str(given).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {spelled(by_lower[near[0]], [given])}?" if near else ""


def unknown_name(kind: str, given: object, valid: Iterable[object], beyond: str = "") -> UserError:
    """The error for a name that is not among `valid`: what was given, the nearest choice, all choices; `beyond` says
    how there can be others."""
    names = [str(name) for name in valid]
    shown = ", ".join(names) if len(names) <= 40 else ", ".join(names[:40]) + ", ..."
    return UserError(
        f"unknown {kind} {spelled(given, names)}{did_you_mean(given, names)} (known: {shown}){beyond and f'; {beyond}'}"
    )


def spelled(value: object, others: Iterable[object]) -> str:
    """`value` as Python writes it; with characters beyond ASCII escaped where one of the `others`, from which a message
    tells it apart, looks the same on a screen."""
    return ascii(value) if any(look_alike(str(value), str(other)) for other in others) else repr(value)


def look_alike(one: str, other: str) -> bool:
    """Whether two different strings can look the same: in another Unicode normal form, with invisible characters, or
    with a Cyrillic or Greek letter in place of a Latin one."""
    if one == other or (one + other).isascii():
        return False
    first, second = (_visible(text) for text in (one, other))
    return len(first) == len(second) and all(a == b or _is_twin(a, b) for a, b in zip(first, second))


def _visible(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    return " ".join("".join(character for character in text if unicodedata.category(character) != "Cf").split())


def _is_twin(one: str, other: str) -> bool:
    scripts = {unicodedata.name(character, "").split(" ")[0] for character in (one, other)}
    return len(scripts) == 2 and scripts <= {"LATIN", "CYRILLIC", "GREEK"}
