"""The lines of a results.jsonl: what counts as a whole record, for everything that looks at one.

Blank lines, a byte order mark and carriage returns, which editors and other systems leave, count for nothing, and a
last line needs no line break. A last line that is no JSON object is torn: its run was killed while it wrote.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically

# Bytes of a file's end that are read first for its last record.
_TAIL = 1 << 16


@dataclass(frozen=True, slots=True)
class Lines:
    """Where the records of a run lie: all of a file, or `size` bytes of it from `begin`, whose first line is its line
    `number`."""

    path: Path
    begin: int = 0
    size: int = -1
    number: int = 1

    def read(self) -> list[bytes]:
        """The lines, bare, without blank ones at the end. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            lines = [_bare(line) for line in file.read(self.size).split(b"\n")]
        while lines and not lines[-1]:
            lines.pop()
        return lines


def numbered_records(where: Lines, warn: Callable[[str], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, record), in file order; a torn last line is told to `warn`.

    Raises UserError, naming file and line, for any other line that is no record; OSError if the file cannot be read.
    """
    lines = where.read()
    for number, line in enumerate(lines, start=where.number):
        if not line:
            continue
        try:
            record = parse(line)
        except ValueError as error:
            if number == where.number + len(lines) - 1:
                warn(f"{where.path}: the last line ({number}) is torn and skipped")
                return
            raise UserError(f"{where.path}, line {number}: not a JSON record ({error})") from error
        yield number, record


def last_of(where: Lines) -> dict[str, Any] | None:
    """The last record; None where there is none, or the last line is torn. Raises OSError."""
    try:
        line = _last_line(where)
        return parse(line) if line else None
    except ValueError:
        return None


def parse(line: bytes) -> dict[str, Any]:
    """The record of a bare line. Raises ValueError where it is none."""
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


def end_last_line(path: Path) -> None:
    """Makes a file ready for another record behind its last one: that gets its line break, or goes where it is torn.

    A file that is not there stays so. Raises UserError where the file cannot be written.
    """
    try:
        if not path.is_file():
            return
        data = path.read_bytes()
        last = last_of(Lines(path))
        if not data or (data.endswith(b"\n") and last is not None):
            return
        whole = data if last is not None else data.rstrip()[: data.rstrip().rfind(b"\n") + 1]
        write_atomically(path, whole if whole.endswith(b"\n") or not whole else whole + b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _last_line(where: Lines) -> bytes:
    """The last line that is not blank, read from the end: records of a long run are megabytes."""
    with open(where.path, "rb") as file:
        end, size = file.seek(0, os.SEEK_END) if where.size < 0 else where.begin + where.size, _TAIL
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
