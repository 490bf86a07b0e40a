"""Errors that are the user's to mend, told in one line each."""

from __future__ import annotations

import difflib
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
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def unknown_name(kind: str, given: object, valid: Iterable[object]) -> UserError:
    """The error for a name that is not among `valid`: what was given, the nearest choice, all choices."""
    names = [str(name) for name in valid]
    shown = ", ".join(names) if len(names) <= 40 else ", ".join(names[:40]) + ", ..."
    return UserError(f"unknown {kind} {given!r}{did_you_mean(given, names)} (known: {shown})")
