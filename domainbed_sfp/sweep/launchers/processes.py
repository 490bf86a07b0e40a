"""Jobs as processes that start warm.

Importing torch, and what a training run needs besides, takes several seconds: as long as a small run. On Linux all jobs
of a launch are forked from one process that has done it (Python's fork server); elsewhere each imports on its own.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from domainbed_sfp.core import crashes, surroundings
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.sweep.job import command_line

PRELOAD = "domainbed_sfp.sweep.launchers.preload"


class JobProcess:
    """A run in a process and a session of its own: Ctrl-C reaches whoever started it alone.

    Args:
        settings: of the run.
        environment: all of its environment variables.
        errors: file that its standard error is appended to; its standard output goes nowhere.
    """

    def __init__(self, settings: RunSettings, environment: Mapping[str, str], errors: Path) -> None:
        # A child begins in the folder in which this program was started, wherever that has gone since.
        given = (settings, dict(environment), Path.cwd(), errors)
        self._process: BaseProcess
        # The fork server reads some of the variables, the number of threads among them, while it imports, and listens
        # on a socket.
        with _environment(environment), surroundings.sockets_folder() as has_sockets:
            if sys.platform == "linux" and has_sockets:
                server = multiprocessing.get_context("forkserver")
                server.set_forkserver_preload([PRELOAD])
                self._process = server.Process(target=_run, args=given)
            else:
                self._process = multiprocessing.get_context("spawn").Process(target=_run, args=given)
            self._process.start()

    def poll(self) -> int | None:
        """Its exit status, -n where signal n has killed it; None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()


def _run(settings: RunSettings, environment: dict[str, str], folder: Path, errors: Path) -> None:
    """The job's process."""

    def computed() -> int:
        _prepare(settings, environment, folder, errors)
        from domainbed_sfp.training.train import train_as_process

        return train_as_process(settings)

    sys.exit(crashes.guarded("domainbed-sfp train", computed))


def _prepare(settings: RunSettings, environment: dict[str, str], folder: Path, errors: Path) -> None:
    """Gives the process the job's folder, variables, streams and threads."""
    import setproctitle

    os.chdir(folder)

    # What `ps` and `nvidia-smi` show; it finds its place by the environment as it was at first.
    setproctitle.setproctitle(shlex.join(["domainbed-sfp", *command_line(settings)]))
    if hasattr(os, "setsid"):
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((Path(os.devnull), 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)

    import torch

    if count := surroundings.threads(environment):
        torch.set_num_threads(count)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Other environment variables for what is started in the block."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
