"""Locks between processes, on this machine and on others that share its files. All locks of the package are these.

A lock is flock's where the file system has it: the system lets go of it when its holder dies. Elsewhere the lock's file
itself is the lock, and names its holder: what a dead machine leaves behind holds until somebody removes it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from domainbed_sfp.core.errors import UserError

# What file systems without flock answer: Lustre, NFS without its lock service, and others.
_NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}

# Seconds between two words about a lock that is waited for.
TELL_SECONDS = 30.0
# A lock's file that has been empty for this long is not being written.
LEFTOVER_SECONDS = 10.0


class Held(UserError):
    """A lock is somebody else's."""


@dataclass(frozen=True)
class Holder:
    """What the file of a lock tells: the machine and the process that made it, where it names them, and its age."""

    path: Path
    host: str | None
    process: int | None
    seconds: float

    def describe(self) -> str:
        """`FILE, of process 12 on host node17, 3 days old`."""
        parts = [repr(str(self.path))]
        if self.host:
            parts.append(f"of process {self.process} on host {self.host}")
        return ", ".join([*parts, f"{_age(self.seconds)} old"])


@contextmanager
def hold(path: Path, timeout: float | None, what: str, way_on: str = "") -> Iterator[None]:
    """Holds the lock `path` for the block.

    Args:
        timeout: seconds to wait; None waits for ever, and says for what on standard error.
        what: what another process does while it holds the lock, for messages.
        way_on: the flag that goes on where the holder is dead; without one the file is to be removed.

    Raises:
        Held: if somebody else holds it for longer.
        OSError: if the file cannot be made.
    """
    lock = _acquired(path, timeout, what, way_on)
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock; False where it cannot be told, as in a copy that may not be written."""
    if not path.exists():
        return False
    try:
        lock = _acquire(path, 0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def holder(path: Path) -> Holder | None:
    """What the lock's file says of its holder, whether or not that one is alive; None where there is no file."""
    try:
        text = path.read_bytes()[:4096].decode("utf-8", errors="replace")
        seconds = max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
    lines = text.split("\n")
    process = int(lines[0]) if re.fullmatch(r"[0-9]{1,18}", lines[0]) else None
    host = "".join(c if c.isprintable() else "?" for c in lines[1].strip()) if len(lines) > 1 and process else ""
    return Holder(path, host[:255] or None, process if host else None, seconds)


def break_lock(path: Path) -> Holder | None:
    """Removes a lock that a file alone holds, and returns whose it was; None where there was none.

    Raises Held for one that a living process holds by flock.
    """
    found = holder(path)
    if found is None or found.host is None:
        return None
    if _has_flock(path):
        # The file is left over from elsewhere, and holds nothing here; a living process' lock is not broken.
        if is_held(path):
            raise Held(f"the lock {str(path)!r} is held by a living process, and cannot be broken")
        return None
    path.unlink(missing_ok=True)
    return found


def _acquired(path: Path, timeout: float | None, what: str, way_on: str) -> BaseFileLock:
    began = time.monotonic()
    while True:
        left = TELL_SECONDS if timeout is None else timeout - (time.monotonic() - began)
        try:
            return _acquire(path, max(0.0, min(left, TELL_SECONDS)))
        except Timeout:
            found = holder(path)
            held = f"the lock {found.describe() if found else repr(str(path))}"
            advice = f"if that process is gone, {way_on or 'remove the file'}" if found and found.host else ""
            if timeout is not None and time.monotonic() - began >= timeout:
                raise Held(f"another process is {what} ({held})" + (f"; {advice}" if advice else "")) from None
            print(f"waiting for another process, which is {what} ({held}); {advice}".rstrip("; "), file=sys.stderr)


def _acquire(path: Path, timeout: float) -> BaseFileLock:
    """The lock, held. Raises Timeout, or OSError."""
    # Older filelocks make the file 0644, whatever the umask says, and shut a group out.
    mode = 0o666 & ~_umask()
    if path.exists():
        mode = stat.S_IMODE(path.stat().st_mode)
    try:
        if _has_flock(path if path.exists() else path.parent):
            lock: BaseFileLock = FileLock(path, mode=mode)
        else:
            if _is_leftover(path):
                path.unlink(missing_ok=True)
            lock = SoftFileLock(path, mode=mode)
        lock.acquire(timeout=timeout)
        if isinstance(lock, SoftFileLock) and not path.stat().st_size:
            lock.release()
            raise _nameless(path)
        return lock
    except NotImplementedError:  # what filelock raises where there is no flock
        raise _nameless(path) from None


def _nameless(path: Path) -> UserError:
    return UserError(
        f"the file system of {str(path)!r} has no flock, and filelock {filelock.__version__} does not note who holds a "
        "lock: pip install 'filelock>=3.24'"
    )


def _is_leftover(path: Path) -> bool:
    """Whether the file names no holder where it alone is the lock, as a copy from a file system with flock: it holds
    nothing then. One that is new may be about to be written."""
    found = holder(path)
    return found is not None and found.seconds > LEFTOVER_SECONDS and not path.stat().st_size


def _has_flock(path: Path) -> bool:
    """Whether the file system of a file or folder has flock. A folder is asked by a new file: file systems answer for
    files. Raises OSError where neither can be opened."""
    try:
        import fcntl
    except ImportError:  # Windows, whose locks are the system's too
        return True
    with tempfile.TemporaryFile(dir=path) if path.is_dir() else open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _NO_FLOCK
    return True


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _age(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' * (count != 1)}"
    return f"{int(seconds)} s"
