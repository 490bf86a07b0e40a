"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from domainbed_sfp.core.errors import UserError


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replaces a file in one move: a reader, or a crash, sees the old contents or the new, never a part.

    The temporary file has a fixed name, so that one a killed process left is overwritten by the next attempt; writers
    of one file must therefore exclude each other. Raises OSError when the folder cannot be written; the old file is
    untouched then. A symbolic link stays one; a device or a pipe, which nothing can replace, is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_output(option: str, path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes the file that a command-line option names, atomically; a UserError that says which where that fails."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from error
