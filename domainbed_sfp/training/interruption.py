"""Signals that ask a run to save where it is and stop."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# What asks a run to save and stop. SLURM sends SIGUSR1 before a time limit; Windows does not have it.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Interrupted(Exception):
    """The run was asked to stop and has saved where it is."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """A stop signal as an exception at a moment that loses nothing: at once, or at the end of a `postponed` block.

    The same signal once more kills.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.is_postponed = False

    def receive(self, number: int, frame: object) -> None:
        """The signal handler."""
        signal.signal(number, signal.SIG_DFL)
        if self.signal_number:  # another one, as SLURM sends when it preempts: the save goes on
            return
        self.signal_number = number
        print(f"{signal.Signals(number).name}: saving and stopping", file=sys.stderr, flush=True)
        if not self.is_postponed:
            self._raise()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """What must not be cut in two: an update of the weights, a save."""
        self.is_postponed = True
        try:
            yield
        finally:
            self.is_postponed = False
        if self.signal_number:
            self._raise()

    def _raise(self) -> None:
        raise Interrupted(self.signal_number, "stopped before the first step; nothing is lost")


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turns STOP_SIGNALS into a request to stop, where signals can be caught: in the main thread."""
    request = StopRequest()
    previous = {}
    with suppress(ValueError):
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, request.receive)
    try:
        if previous and hasattr(signal, "pthread_sigmask"):
            # Whoever started this run may have held them back until somebody listens (sweep/slurm_task.py does).
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
