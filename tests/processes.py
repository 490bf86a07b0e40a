"""Commands in other processes: one that starts at once, forked from a process that has imported what it needs; and
several, one after another, in a new process that finds other packages."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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


def one_after_another(
    commands: Sequence[Sequence[object]], folder: Path, site: Path
) -> list[subprocess.CompletedProcess[str]]:
    """`domainbed-sfp ARGUMENTS` for each of the `commands`, in one new process, which imports but once: begun in
    `folder`, with the packages that are installed in `site`."""
    words = [list(map(str, command)) for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_ANOTHER, json.dumps(words)], cwd=folder, capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    return [subprocess.CompletedProcess(command, *one) for command, one in zip(words, told)]


_ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from domainbed_sfp.cli import main

told = []
for words in json.loads(sys.argv[1]):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            main.main(words)
        except SystemExit as ended:
            told.append((ended.code, out, errors))
print(json.dumps([(code, out.getvalue(), errors.getvalue()) for code, out, errors in told]))
"""
