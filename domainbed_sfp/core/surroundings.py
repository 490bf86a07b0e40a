"""What a process finds around itself, made so that everything can live with it: streams, variables, folders.

Containers, batch systems and `nohup` start programs with closed streams, terminals of any encoding, variables that are
set to nothing, and users whom no passwd entry names.
"""

from __future__ import annotations

import codecs
import getpass
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

# What our texts hold beyond ASCII, for terminals that cannot show it.
_ASCII = {
    "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u2192": "->", "±": "+-", "\u00d7": "x", "†": "*",
    "‡": "**", "²": "2", "\u2026": "...",
}  # fmt: skip

_ERRORS = "domainbed_sfp.replace"

# A socket's path has 107 bytes on Linux, 103 on macOS; multiprocessing appends `/pymp-xxxxxxxx/listener-xxxxxxxx`.
_SOCKET_FOLDER_BYTES = 103 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")


def prepare() -> None:
    """Makes the process' streams and variables usable; to be called first, and harmless when called again."""
    _open_streams()
    _name_the_user()
    # Set to nothing counts as unset (XDG Base Directory specification), which torch and others do not know.
    if os.environ.get("XDG_CACHE_HOME") == "":
        del os.environ["XDG_CACHE_HOME"]


def _open_streams() -> None:
    """Opens closed standard streams on the null device, so that no file takes their numbers, and has the others
    replace what their encoding lacks."""
    codecs.register_error(_ERRORS, _replace)
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
        stream: TextIO | None = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors=_ERRORS))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """The nearest ASCII of what an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in text), error.end


def _name_the_user() -> None:
    """A container's `--user 54321` has no passwd entry, and torch asks for a name."""
    with suppress(Exception):  # what getpass raises there differs between versions of Python
        getpass.getuser()
        return
    os.environ["USER"] = f"uid{os.getuid()}" if hasattr(os, "getuid") else "user"


def threads(environment: Mapping[str, str]) -> int | None:
    """The number of threads that OMP_NUM_THREADS asks for; None where it is unset, or is no number of at least 1.

    OpenMP takes a list, one number for every level of nested loops: the first is ours.
    """
    return whole_number(environment.get("OMP_NUM_THREADS", "").split(",")[0])


def whole_number(text: str | None) -> int | None:
    """The number of at least 1 that a variable holds; None where it holds none."""
    match = re.fullmatch(r"\s*\+?([0-9]{1,6})\s*", text or "")
    return (int(match[1]) or None) if match else None


def with_threads(environment: Mapping[str, str], count: int) -> dict[str, str]:
    """`environment` with `count` threads where it does not ask for a number itself; what is no number is replaced."""
    given = threads(environment)
    result = dict(environment)
    if given is None:
        result["OMP_NUM_THREADS"] = str(count)
    if whole_number(result.get("MKL_NUM_THREADS")) is None:
        result["MKL_NUM_THREADS"] = str(given or count)
    return result


def cache_home() -> Path | None:
    """The user's folder of caches; None for a user without a home."""
    # The specification has relative paths ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    if given.is_absolute():
        return given
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


@contextmanager
def sockets_folder() -> Iterator[bool]:
    """While it lasts, temporary files lie where a socket's path is short enough; yields whether there is such a place.

    TMPDIR of a batch job is often too long for that.
    """
    before = tempfile.tempdir
    chosen = next((folder for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm") if _fits(folder)), None)
    if chosen is None:
        yield False
        return
    tempfile.tempdir = chosen
    try:
        yield True
    finally:
        tempfile.tempdir = before


def _fits(folder: str) -> bool:
    return len(os.fsencode(folder)) <= _SOCKET_FOLDER_BYTES and os.access(folder, os.W_OK | os.X_OK)
