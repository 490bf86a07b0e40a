"""What a launcher is: it takes the jobs of a sweep that are not done, runs them somewhere, and says how each one ended.

Launchers of other packages come through the entry-point group `domainbed_sfp.launchers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from domainbed_sfp.core.registry import Registry, origin_of
from domainbed_sfp.runs.settings import RunSettings
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.job import PROGRAM, Job, command_line


@dataclass(frozen=True)
class Task:
    """A job and the settings of its run."""

    job: Job
    settings: RunSettings

    @property
    def command(self) -> list[str]:
        """The command that computes it."""
        return [*PROGRAM, *command_line(self.settings)]


@dataclass
class Outcome:
    """How a launch ended: jobs done, failures as (job, reason), and whether it was interrupted."""

    done: int = 0
    failures: list[tuple[Job, str]] = field(default_factory=list)
    interrupted: bool = False


class Launcher(Protocol):
    """Runs the tasks, `slots` at a time where it counts them. The directory knows every job's state from disk."""

    def __call__(self, tasks: Sequence[Task], directory: SweepDirectory, slots: int) -> Outcome: ...


LAUNCHERS: Registry[Launcher] = Registry("command launcher", "domainbed_sfp.sweep.launchers", "launchers")

LauncherT = TypeVar("LauncherT", bound=Callable[..., Outcome])


def launcher(name: str) -> Callable[[LauncherT], LauncherT]:
    """Decorator of a function: makes it known as launcher `name`."""

    def decorate(launch: LauncherT) -> LauncherT:
        LAUNCHERS.add(name, launch, origin_of(launch))
        return launch

    return decorate
