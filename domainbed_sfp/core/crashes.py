"""The last net: whatever a command raises ends in one line, and a status.

A UserError is the user's to mend and says how. Anything else is ours or the machine's: the line says what was being
done and where the traceback was saved, and DOMAINBED_SFP_DEBUG=1 shows it.
"""

from __future__ import annotations

import errno
import os
import platform
import select
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from domainbed_sfp.core import surroundings
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.version import __version__

DEBUG = "DOMAINBED_SFP_DEBUG"

# Statuses: some work failed, bad input, interrupted by Ctrl-C.
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

# What of a message fits into a line.
_LENGTH = 400

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def guarded(doing: str, command: Callable[[], int]) -> int:
    """The exit status of `command`, whatever it raises: its own, or that of the one line which is then printed.

    doing: the command in the user's words, for that line.
    """
    status = 0
    try:
        surroundings.prepare()
        status = command()
        sys.stdout.flush()
        return status
    except UserError as error:
        _say(f"error: {one_line(error)}")
        return getattr(error, "exit_status", BAD_INPUT)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError as error:
        if _reader_is_gone():  # as `| head` does
            return status
        return _report(doing, error)
    except SystemExit:
        raise
    except BaseException as error:
        return _report(doing, error)
    finally:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            _give_up_broken(stream, descriptor)


def one_line(error: BaseException) -> str:
    """An error's message without its line ends."""
    return " ".join(str(error).split("\n")) if "\n" in str(error) else str(error)


def keep(error: BaseException, file: str | os.PathLike[str]) -> None:
    """Notes that the traceback of `error` is in `file` already: the report names it then, and writes no other."""
    error.__dict__["traceback_file"] = os.fspath(file)


def advice(error: BaseException) -> str | None:
    """What to do about an exhausted machine, in a clause; None for other errors."""
    told = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "outofmemoryerror" in told or any(words in told for words in _OUT_OF_MEMORY):
        return "out of memory; lower hparam batch_size or image_size, or --jobs, or take a machine with more"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; make room, and give the same command again: nothing written before is lost"
    return None


def _report(doing: str, error: BaseException) -> int:
    """Says in one line what went wrong, after the traceback where that is asked for."""
    if os.environ.get(DEBUG, "") not in ("", "0"):
        _say("".join(traceback.format_exception(error)).rstrip())
    known = advice(error)
    what = known or f"{type(error).__name__}: {one_line(error)[:_LENGTH]}{_place(error)}"
    saved = _save(doing, error)
    kept = f"the traceback is in {saved}" if saved else f"{DEBUG}=1 shows the traceback"
    request = "" if known else ". Nobody foresaw this: please report it with that, as CONTRIBUTING.md says"
    _say(f"error: {doing}: {what}; {kept}{request}")
    return FAILED


def _save(doing: str, error: BaseException) -> str | None:
    """Writes the traceback to a temporary file, unless it is kept elsewhere; None where that cannot be."""
    kept = getattr(error, "traceback_file", None)
    if kept is not None:
        return str(kept)
    head = (
        f"domainbed_sfp {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"{time.strftime('%Y-%m-%d %H:%M:%S')} {doing}\n{shlex.join(sys.argv)}\n\n"
    )
    text = head + "".join(traceback.format_exception(error))
    with suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="domainbed-sfp-", suffix=".traceback.txt")
        try:
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return path
        except OSError:
            Path(path).unlink(missing_ok=True)
    return None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # where even that cannot be said, the status has to do
        print(text, file=sys.stderr, flush=True)


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe whose other end is closed. To flush once more does not tell: what a write that
    failed had buffered may be gone with it."""
    if not hasattr(select, "poll"):  # Windows
        return True
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _give_up_broken(stream: TextIO, descriptor: int) -> None:
    """Points a stream that cannot be written at the null device: Python flushes it once more at its end, and would
    print what that raises."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
