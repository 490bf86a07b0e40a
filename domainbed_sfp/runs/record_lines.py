"""The lines of a results.jsonl: what counts as a whole record, for everything that looks at one.

Blank lines, a byte order mark and carriage returns, which editors and other systems leave, count for nothing, and a
last line needs no line break. A last line that is no JSON object is torn: its run was killed while it wrote.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically

# Bytes of a file's end that are read first for its last record.
_TAIL = 1 << 16


def numbered_records(path: str | os.PathLike[str], warn: Callable[[str], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, record), in file order; a torn last line is told to `warn`.

    Raises UserError, naming file and line, for any other line that is no record; OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    while lines and not _bare(lines[-1]):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not (text := _bare(line)):
            continue
        try:
            record = _parse(text)
        except ValueError as error:
            if number == len(lines):
                warn(f"{path}: the last line ({number}) is torn and skipped")
                return
            raise UserError(f"{path}, line {number}: not a JSON record ({error})") from error
        yield number, record


def last_of(path: Path) -> dict[str, Any] | None:
    """The last record; None where there is none, or the last line is torn. Raises OSError."""
    try:
        line = _last_line(path)
        return _parse(line) if line else None
    except ValueError:
        return None


def end_last_line(path: Path) -> None:
    """Makes a file ready for another record behind its last one: that gets its line break, or goes where it is torn.

    A file that is not there stays so. Raises UserError where the file cannot be written.
    """
    try:
        if not path.is_file():
            return
        data = path.read_bytes()
        if not data or (data.endswith(b"\n") and last_of(path) is not None):
            return
        whole = data if last_of(path) is not None else data.rstrip()[: data.rstrip().rfind(b"\n") + 1]
        write_atomically(path, whole if whole.endswith(b"\n") or not whole else whole + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _last_line(path: Path) -> bytes:
    """The last line that is not blank, read from the end: records of a long run are megabytes."""
    with open(path, "rb") as file:
        end, size = file.seek(0, os.SEEK_END), _TAIL
        while True:
            begin = file.seek(max(0, end - size))
            lines = file.read(end - begin).split(b"\n")
            # The first line may have begun before the part that was read.
            whole = lines if begin == 0 else lines[1:]
            if (found := next(filter(None, map(_bare, reversed(whole))), b"")) or begin == 0:
                return found
            size *= 4


def _bare(line: bytes) -> bytes:
    """A line without what editors and other systems put around it: a byte order mark, a carriage return."""
    return line.strip().removeprefix(codecs.BOM_UTF8).strip()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except ValueError:
        try:
            record = json.loads(line)  # a diverged loss is written as NaN, which orjson refuses
        except RecursionError:
            raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("expected an object")
    return record
