"""Jobs as processes that start warm.

Importing torch, and what a training run needs besides, takes several seconds: as long as a small run. On Linux all jobs
of a launch are forked from one process that has done it (Python's fork server); elsewhere each imports on its own.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from domainbed_sfp.core import crashes, surroundings

PRELOAD = "domainbed_sfp.sweep.preload"


class JobProcess:
    """A command of `domainbed-sfp` in a process and a session of its own: Ctrl-C reaches whoever started it alone.

    Args:
        arguments: the command line without the program, `train --algorithm ERM ...`.
        environment: all of its environment variables.
        errors: file that its standard error is appended to; its standard output goes nowhere.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], errors: Path) -> None:
        # A child begins in the folder in which this program was started, wherever that has gone since.
        given = (list(arguments), dict(environment), Path.cwd(), errors)
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

    def wait(self) -> None:
        """Returns when it has ended."""
        self._process.join()


def _run(arguments: list[str], environment: dict[str, str], folder: Path, errors: Path) -> None:
    """The job's process."""

    def prepared() -> int:
        _prepare(arguments, environment, folder, errors)
        return 0

    if status := crashes.guarded("starting a job", prepared):
        sys.exit(status)
    from domainbed_sfp.cli import main as cli

    cli.main(arguments)


def _prepare(arguments: list[str], environment: dict[str, str], folder: Path, errors: Path) -> None:
    """Gives the process the job's folder, variables, streams and threads."""
    import setproctitle

    os.chdir(folder)

    # What `ps` and `nvidia-smi` show; it finds its place by the environment as it was at first.
    setproctitle.setproctitle(shlex.join(["domainbed-sfp", *arguments]))
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
