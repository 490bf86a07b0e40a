"""Launchers of DomainBed's sweep whose jobs know our algorithms."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.sweep.capacity import visible_gpus
from domainbed_sfp.sweep.launchers.slots import POLL_SECONDS, Slots
from domainbed_sfp.upstream.checkout import Checkout

Launcher = Callable[[list[str]], None]

# How DomainBed's sweep begins a job's command, whatever the interpreter is called.
JOB_COMMAND = re.compile(r"\S*python\S* -m domainbed\.scripts\.(?P<script>\w+)(?= |$)")


def register_launchers(checkout: Checkout, slots: int) -> SlotLauncher:
    """Adds the launcher `slots`, and makes all launchers start jobs that know our algorithms."""
    launchers: dict[str, Launcher] = checkout.command_launchers.REGISTRY
    launcher = SlotLauncher(slots)
    launchers.setdefault("slots", launcher)
    for name, launch in launchers.items():
        launchers[name] = _with_own_entry_point(launch, checkout.root)
    return launcher


def _with_own_entry_point(launch: Launcher, root: Path) -> Launcher:
    def launch_ours(commands: list[str]) -> None:
        launch([job_command(command, root) for command in commands])

    return launch_ours


def job_command(command: str, root: Path) -> str:
    """A job's shell command as DomainBed's sweep writes it, turned into one through this bridge.

    Raises UserError for a command of another form: its job would not know our algorithms.
    """
    match = JOB_COMMAND.match(command)
    if match is None:
        raise UserError(
            f"the checkout's sweep starts jobs by {command[:80]!r}, expected python -m domainbed.scripts.train ..."
        )
    words = [
        sys.executable,
        "-m",
        "domainbed_sfp",
        "upstream",
        "--domainbed_root",
        str(root),
        "--",
        match["script"],
    ]
    return shlex.join(words) + command[match.end() :]


class SlotLauncher:
    """A launcher for DomainBed's sweep that runs `slots` jobs at a time, and says which ones failed.

    Each job has its share of the threads, and a GPU if there is one. What jobs print is in their out.txt and
    err.txt.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.failures: list[str] = []

    def __call__(self, commands: list[str]) -> None:
        waiting, ended = list(commands), 0
        slots: Slots[str] = Slots(max(1, min(self.slots, len(waiting))), visible_gpus())
        try:
            while waiting or slots:
                for command, status, told in slots.take_ended():
                    ended += 1
                    self._report(command, status, told, f"{ended} of {len(commands)} jobs")
                while waiting and slots.is_free():
                    command = waiting.pop(0)
                    slots.start(command, partial(_begin, command))
                time.sleep(POLL_SECONDS)
        finally:
            # Only after an interruption something is left.
            slots.stop(lambda: time.sleep(POLL_SECONDS))
        print(f"{ended - len(self.failures)} jobs done, {len(self.failures)} failed")

    def _report(self, command: str, status: int, told: str, count: str) -> None:
        print(f"{count}: {'done' if status == 0 else f'failed with exit status {status}'}", flush=True)
        if status:
            self.failures.append(command)
            print("\n".join(filter(None, (f"failed: {command}", told))), file=sys.stderr, flush=True)


def _begin(command: str, environment: Mapping[str, str], errors: Path) -> subprocess.Popen[bytes]:
    with open(errors, "ab") as file:
        return subprocess.Popen(shlex.split(command), env=environment, stdout=subprocess.DEVNULL, stderr=file)
