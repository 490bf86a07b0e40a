"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ItemT = TypeVar("ItemT")

# Seconds between two lines in a log.
LOG_INTERVAL = 15.0


def bar(console: Console) -> Progress:
    """The bar all commands use: title, bar, done of total, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def progress(items: Iterable[ItemT], total: int, title: str, unit: str) -> Iterator[ItemT]:
    """Yields `items`, telling on standard error how far it is."""
    if sys.stderr.isatty():
        with bar(Console(stderr=True)) as display:
            yield from display.track(items, total=total, description=title)
        return
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if done < total and time.monotonic() - last > LOG_INTERVAL:
            last = time.monotonic()
            print(f"{title}: {done} of {total} {unit}", file=sys.stderr, flush=True)
