"""The table of a sweep while it is being computed, here or on a cluster."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.progress import LOG_INTERVAL
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.runs import records
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.directory import State, SweepDirectory, failure_reason
from domainbed_sfp.sweep.job import Job
from domainbed_sfp.sweep.slurm_batches import QueueUnreachable, Standing

# Running and failed jobs that are shown one by one.
SHOWN_JOBS = 8
# Without a queue, a pause between two jobs of a local launch looks like its end; it is shorter than this.
QUIET_SECONDS = 30.0

# Seconds between two looks.
LONGEST_PAUSE = 86400.0

ACTIVE = (State.RUNNING, State.PENDING)


def summary(states: Iterable[State]) -> str:
    """One line of how many jobs stand where."""
    counts = Counter(states)
    line = (
        f"{counts.total()} jobs: {counts[State.DONE]} done, {counts[State.INCOMPLETE]} incomplete, "
        f"{counts[State.NOT_LAUNCHED]} not launched"
    )
    for state in (State.RUNNING, State.PENDING, State.FAILED):
        if counts[state]:
            line += f", {counts[state]} {state.value.lower()}"
    return line + "."


@dataclass(frozen=True)
class View:
    """One look at a sweep."""

    states: dict[Job, State]
    standings: dict[str, Standing]
    trouble: str | None

    @property
    def is_done(self) -> bool:
        return all(state is State.DONE for state in self.states.values())

    @property
    def is_active(self) -> bool:
        return any(state in ACTIVE for state in self.states.values())


class Watch:
    """Looks at a sweep every `seconds` until nothing waits or runs.

    On a terminal a table is drawn anew each time; in a log, a line is printed when something has changed.
    """

    def __init__(self, directory: SweepDirectory, jobs: Sequence[Job], seconds: float) -> None:
        if not 0 < seconds <= LONGEST_PAUSE:
            raise UserError(f"--watch: expected a number of seconds above 0 and at most a day, got {seconds:g}")
        self.directory = directory
        self.jobs = list(jobs)
        self.seconds = seconds
        self.standings: dict[str, Standing] = {}

    def run(self) -> int:
        """Watches; 0 when all jobs are done, 1 when some are not and nothing goes on."""
        console = Console()
        if console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                for view in self._views():
                    live.update(self.table(view), refresh=True)
        else:
            told, told_at = "", 0.0
            for view in self._views():
                line = summary(view.states.values()) + (f" ({view.trouble})" if view.trouble else "")
                is_due = not told or not view.is_active or time.monotonic() - told_at > LOG_INTERVAL
                if line != told and is_due:
                    print(line, flush=True)
                    told, told_at = line, time.monotonic()
        for job, reason in self._failures(view):
            print(f"failed: {job.describe()}: {reason}", file=sys.stderr)
        return 0 if view.is_done else 1

    def table(self, view: View) -> Group:
        """Counts by data set and algorithm, running jobs with their steps, and failures with their reasons."""
        table = Table(title=str(self.directory.path), title_justify="left")
        for name in ("data set", "algorithm"):
            table.add_column(name)
        for state in State:
            table.add_column(state.value.lower(), justify="right")
        rows: dict[tuple[str, str], Counter[State]] = {}
        for job, state in view.states.items():
            label = job.algorithm + (f" {job.hparams}" if job.hparams else "")
            rows.setdefault((job.dataset, label), Counter())[state] += 1
        for names, counts in rows.items():
            table.add_row(*map(Text, names), *(str(counts[state] or "") for state in State))
        lines = [summary(view.states.values())]
        running = [job for job, state in view.states.items() if state is State.RUNNING]
        lines += [f"running: {job.describe()}: {self._progress(job, view)}" for job in running[:SHOWN_JOBS]]
        lines += [f"failed: {job.describe()}: {reason}" for job, reason in self._failures(view)[:SHOWN_JOBS]]
        if view.trouble:
            lines.append(view.trouble)
        return Group(table, *map(Text, lines))

    def _views(self) -> Iterator[View]:
        """At least one look; the last one finds everything done, or nothing going on."""
        active_at = time.monotonic()
        while True:
            view = self.look()
            yield view
            if view.is_active or view.trouble:
                active_at = time.monotonic()
            # What SLURM has no more is over; a local launch may be between two jobs.
            patience = 0.0 if view.standings else QUIET_SECONDS
            is_over = not (view.is_active or view.trouble) and time.monotonic() - active_at >= patience
            if view.is_done or is_over:
                return
            time.sleep(self.seconds)

    def look(self) -> View:
        """The sweep as it stands; what SLURM has said before holds while it does not answer."""
        trouble = None
        try:
            self.standings = slurm_batches.look(self.directory.path)
        except QueueUnreachable as error:
            trouble = f"{error}; asking again"
        return View(self.directory.states(self.jobs, self.standings), self.standings, trouble)

    def _progress(self, job: Job, view: View) -> str:
        folder = self.directory.job_dir(job)
        total = job.steps or get_dataset_class(job.dataset).N_STEPS
        standing = view.standings.get(folder.name)
        where = f" (SLURM job {standing.queued.id})" if standing and standing.queued else ""
        return f"step {records.saved_step(folder)} of {total}{where}"

    def _failures(self, view: View) -> list[tuple[Job, str]]:
        failed = [job for job, state in view.states.items() if state is State.FAILED]
        return [
            (job, failure_reason(self.directory.job_dir(job), view.standings) or "it does not say why")
            for job in failed
        ]
