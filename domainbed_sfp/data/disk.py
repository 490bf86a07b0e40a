"""What goes wrong with a disk, said in one line."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from domainbed_sfp.core.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT}


def in_bytes(count: int) -> str:
    """`count` bytes in the unit a person would pick: 9.8 MB, 6.5 GB (powers of ten)."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def disk_error(error: OSError, doing: str) -> UserError:
    """The one-line error for an operating system error met while `doing` something."""
    if error.errno in FULL:
        return UserError(f"the disk is full: {doing} stopped; free some space and run the command again")
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"{doing} failed: {error.strerror or error}{where}")


def require_space(directory: Path, needed: int, doing: str) -> None:
    """Raises UserError when the disk of `directory` has fewer than `needed` bytes left."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"the disk is too full: {doing} takes {in_bytes(needed)}, {in_bytes(free)} are left")
