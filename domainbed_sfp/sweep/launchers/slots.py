"""Processes side by side on this machine, each with its share of the threads and a GPU if there is one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from domainbed_sfp.sweep.capacity import job_environment

# Seconds between two looks at what has ended.
POLL_SECONDS = 0.2
# Lines of what a failed process says that are shown.
TAIL_LINES = 8

WhatT = TypeVar("WhatT")


class Process(Protocol):
    """What is asked of a process; `subprocess.Popen` answers, too."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


@dataclass
class _Running(Generic[WhatT]):
    what: WhatT
    process: Process
    # A file with what it says on standard error.
    errors: Path


class Slots(Generic[WhatT]):
    """`count` places for processes, each known by what it computes."""

    def __init__(self, count: int, gpus: Sequence[str]) -> None:
        self.count, self.gpus = count, gpus
        self._running: dict[int, _Running[WhatT]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def running(self) -> list[WhatT]:
        """What is computed now."""
        return [one.what for one in self._running.values()]

    def is_free(self) -> bool:
        """Whether another one can be started."""
        return len(self._running) < self.count

    def start(self, what: WhatT, begin: Callable[[Mapping[str, str], Path], Process]) -> None:
        """Begins a process in a free place. begin: gets its environment, and the file for its standard error."""
        slot = min(set(range(self.count)) - self._running.keys())
        descriptor, errors = tempfile.mkstemp(prefix="domainbed-sfp-", suffix=".err")
        os.close(descriptor)
        process = begin(job_environment(slot, self.count, self.gpus), Path(errors))
        self._running[slot] = _Running(what, process, Path(errors))

    def take_ended(self) -> list[tuple[WhatT, int, str]]:
        """What has ended since the last time: exit status (-n where signal n has killed it), and what it said last on
        standard error."""
        ended = []
        for slot, one in list(self._running.items()):
            if (status := one.process.poll()) is not None:
                del self._running[slot]
                ended.append((one.what, status, tail_of(one.errors)))
                one.errors.unlink(missing_ok=True)
        return ended

    def kill(self) -> None:
        """Kills all processes."""
        for one in self._running.values():
            one.process.kill()

    def stop(self, wait: Callable[[], None]) -> None:
        """Asks all processes to end, and returns when they have. wait: called between two looks."""
        for one in self._running.values():
            one.process.terminate()
        while self._running:
            self.take_ended()
            wait()


def tail_of(file: Path) -> str:
    """The last lines of a file, indented; empty where it says nothing or is not there."""
    told = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    return "\n".join(f"    {line}" for line in told.strip().splitlines()[-TAIL_LINES:])
