"""What a run says: on the console and, at the same time, in out.txt and err.txt of its folder."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.layout import ERR, OUT

# Seconds between two lines of progress in a log, and between two states of the one line on a terminal.
LOG_INTERVAL = 30.0
TERMINAL_INTERVAL = 0.5


class Console:
    """Prints one line of numbers a record, and how far a run is in between."""

    def __init__(self) -> None:
        self.columns: list[str] = []
        self.told_at = time.monotonic()

    def row(self, record: Mapping[str, Any]) -> None:
        """One line of numbers per record, under DomainBed's column heads."""
        self.told_at = time.monotonic()
        columns = sorted(name for name, value in record.items() if isinstance(value, (int, float)))
        if _on_terminal():
            _show("")
        # What a method measures may begin after the first record.
        if columns != self.columns:
            print("  ".join(name.ljust(12)[:12] for name in columns))
            self.columns = columns
        cells = [f"{record[name]:.10f}" if isinstance(record[name], float) else str(record[name]) for name in columns]
        print("  ".join(cell.ljust(12)[:12] for cell in cells), flush=True)

    def progress(self, step: int, steps: int, metrics: Mapping[str, Sequence[float]]) -> None:
        """Now and then a line that tells how far the run is, from what its steps have measured of late."""
        if time.monotonic() - self.told_at <= (TERMINAL_INTERVAL if sys.stderr.isatty() else LOG_INTERVAL):
            return
        self.told_at = time.monotonic()
        loss, seconds = metrics.get("loss", [math.nan])[-1], float(np.mean(metrics["step_time"]))
        line = (
            f"step {step} of {steps}: loss {loss:.4f}, {seconds:.2f} s a step, "
            f"{(steps - step - 1) * seconds / 60:.0f} min of training left"
        )
        if _on_terminal():
            _show(line)
        else:
            print(line, file=sys.stderr, flush=True)


def print_head(*sections: tuple[str, Mapping[str, Any]]) -> None:
    """Prints what a run begins with: titles, and under each a line for every value."""
    for title, values in sections:
        print(f"{title}:")
        for name, value in values.items():
            print(f"\t{name}: {value}", flush=True)


def _on_terminal() -> bool:
    return isinstance(sys.stderr, _Tee) and sys.stderr.isatty()


def _show(line: str) -> None:
    assert isinstance(sys.stderr, _Tee)
    sys.stderr.show(line)


class _Tee:
    """Writes to two streams, as DomainBed's Tee."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream = stream
        self.file = file
        self.stream_is_gone = False

    def write(self, text: str) -> int:
        with self._stream() as stream:
            stream.write(text)
        return self.file.write(text)

    def flush(self) -> None:
        with self._stream() as stream:
            stream.flush()
        with suppress(OSError):  # a full disk must not hide the error that is being told
            self.file.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def show(self, line: str) -> None:
        """Puts `line` in place of the terminal's current one; the file does not get it."""
        with self._stream() as stream:
            stream.write(f"\r\x1b[K{line}")
            stream.flush()

    @contextmanager
    def _stream(self) -> Iterator[TextIO]:
        """The stream, or none of it: whoever reads it can go away, as a terminal or `| head` does, and the run goes on
        with its files."""
        try:
            yield StringIO() if self.stream_is_gone else self.stream
        except (OSError, ValueError):
            self.stream_is_gone = True


def note(err: TextIO, text: str) -> None:
    """Writes to err.txt alone: the command line tells the user on its own."""
    with suppress(OSError):
        err.write(text.rstrip() + "\n")
        err.flush()


@contextmanager
def tee(output_dir: Path) -> Iterator[TextIO]:
    """Standard output and error also go to out.txt and err.txt; yields the latter."""
    stdout, stderr = sys.stdout, sys.stderr
    try:
        out, err = (
            open(output_dir / name, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            for name in (OUT, ERR)
        )
    except OSError as error:
        raise UserError(f"output_dir {str(output_dir)!r} cannot be written: {error.strerror}") from error
    sys.stdout, sys.stderr = _Tee(stdout, out), _Tee(stderr, err)
    try:
        yield err
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for file in (out, err):
            with suppress(OSError):
                file.close()
