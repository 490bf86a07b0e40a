"""A launcher that runs nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.launchers.base import Outcome, Task, launcher


@launcher("dummy")
def launch_dummy(tasks: Sequence[Task], directory: SweepDirectory, slots: int) -> Outcome:
    """Prints each command."""
    for task in tasks:
        print(shlex.join(task.command))
    return Outcome()
