"""Commands in processes of their own that start at once: forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from domainbed_sfp.sweep.launchers.processes import PRELOAD


class Command:
    """`domainbed-sfp ARGUMENTS` in `folder`, with the interface of subprocess.Popen as far as tests need it."""

    def __init__(self, *arguments: object, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._printed = [Path(tempfile.mkstemp(prefix="command-")[1]) for _ in range(2)]
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload([PRELOAD])
        given = (list(map(str, arguments)), folder, dict(environment), self._printed)
        self._process = context.Process(target=_run, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for its end; what it printed on standard output and error."""
        self._process.join(timeout)
        assert self.returncode is not None, f"the command has not ended after {timeout:g} s"
        out, err = (file.read_text() for file in self._printed)
        for file in self._printed:
            file.unlink()
        return out, err


def _run(arguments: list[str], folder: Path, environment: dict[str, str], printed: list[Path]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    from domainbed_sfp.cli import main as cli

    cli.main(arguments)
