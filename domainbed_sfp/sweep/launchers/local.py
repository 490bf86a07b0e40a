"""Launchers for this machine: its cores, or all of its GPUs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console

from domainbed_sfp.core import locks
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.progress import LOG_INTERVAL, bar
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.runs import records
from domainbed_sfp.runs.layout import ERR, LOCK
from domainbed_sfp.sweep.capacity import visible_gpus
from domainbed_sfp.sweep.directory import WAY_ON, State, SweepDirectory
from domainbed_sfp.sweep.job import Job
from domainbed_sfp.sweep.launchers.base import Outcome, Task, launcher
from domainbed_sfp.sweep.launchers.processes import JobProcess
from domainbed_sfp.sweep.launchers.slots import POLL_SECONDS, Slots, tail_of
from domainbed_sfp.training.folder import AlreadyRunning

# Asking for another launch's jobs takes their locks for a moment.
LOOK_ELSEWHERE_SECONDS = 2.0


@launcher("local")
def launch_local(tasks: Sequence[Task], directory: SweepDirectory, slots: int) -> Outcome:
    """Runs the jobs on this machine, `slots` at a time, each with its share of threads and a GPU if there is one."""
    return _LocalLaunch(tasks, directory, slots, visible_gpus()).run()


@launcher("multi_gpu")
def launch_multi_gpu(tasks: Sequence[Task], directory: SweepDirectory, slots: int) -> Outcome:
    """Runs the jobs on all GPUs, at least one at a time on each."""
    gpus = required_gpus()
    return _LocalLaunch(tasks, directory, max(slots, len(gpus)), gpus).run()


def required_gpus() -> list[str]:
    """As `visible_gpus`; a UserError where there is none."""
    gpus = visible_gpus()
    if not gpus:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if listed is None else f" (CUDA_VISIBLE_DEVICES is {listed!r})"
        raise UserError(f"--command_launcher multi_gpu: no GPU is visible{why}; use local")
    return gpus


class _LocalLaunch:
    """One launch on this machine."""

    def __init__(self, tasks: Sequence[Task], directory: SweepDirectory, slots: int, gpus: list[str]) -> None:
        self.waiting = list(tasks)
        self.total = len(tasks)
        self.directory = directory
        # More would only divide the cores into smaller shares.
        self.slots: Slots[Task] = Slots(max(1, min(slots, len(self.waiting))), gpus)
        # Jobs that another launch is computing; taken over if that one dies.
        self.elsewhere: list[Task] = []
        self.outcome = Outcome()
        self.stop = False
        self.began_at = self.told_at = time.monotonic()
        self.looked_at = 0.0

    def run(self) -> Outcome:
        """Runs all jobs; after SIGINT or SIGTERM, stops them with their checkpoints saved."""
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        console = Console(stderr=True)
        try:
            if console.is_terminal:
                with bar(console) as display:
                    shown = display.add_task("sweep", total=float(self.total))
                    self._loop(lambda: display.update(shown, completed=self._progress(), description=self._counts()))
            else:
                self._loop(self._tell)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.outcome.interrupted = self.stop
        return self.outcome

    def _loop(self, show: Callable[[], None]) -> None:
        while self.waiting or self.slots or self.elsewhere:
            if self.stop:
                self._stop_all()
                return
            self._start_free_slots()
            self._collect_ended()
            if not self.waiting and self.slots.is_free():
                self._look_elsewhere()
            show()
            time.sleep(POLL_SECONDS)

    def _start_free_slots(self) -> None:
        while self.slots.is_free() and self.waiting:
            task = self.waiting.pop(0)
            state = self.directory.state(task.job)
            if state is State.DONE:
                self.outcome.done += 1
            elif state is State.RUNNING:
                self.elsewhere.append(task)
                self._tell_of_lock(task.job)
            else:
                # Ctrl-C reaches this launcher, which then asks each job to save and stop.
                self.slots.start(task, partial(JobProcess, task.settings))

    def _collect_ended(self) -> None:
        for task, status, told in self.slots.take_ended():
            if self.directory.state(task.job) is State.DONE:
                self.outcome.done += 1
            elif status == AlreadyRunning.exit_status:
                self.elsewhere.append(task)
            else:
                reason = self._reason(task.job, status, told)
                self.outcome.failures.append((task.job, reason))
                print(f"failed: {task.job.describe()}\n{reason}", file=sys.stderr, flush=True)

    def _reason(self, job: Job, status: int, told: str) -> str:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        file = self.directory.job_dir(job) / ERR
        where = file if file.exists() else "it"
        tail = told or tail_of(file)
        return f"  {how}; {where} ends with:\n{tail}" if tail else f"  {how}; it said nothing"

    def _tell_of_lock(self, job: Job) -> None:
        """Where a file alone is the lock, its holder may have died, and nobody would ever take the job over."""
        found = locks.holder(self.directory.job_dir(job) / LOCK)
        if found and found.host:
            told = f"waiting for {job.describe()}: its lock {found.describe()}; if that process is gone, {WAY_ON}"
            print(told, file=sys.stderr, flush=True)

    def _look_elsewhere(self) -> None:
        """Jobs of other launches that have ended: done, or to be taken over here."""
        if time.monotonic() - self.looked_at < LOOK_ELSEWHERE_SECONDS:
            return
        self.looked_at = time.monotonic()
        for task in list(self.elsewhere):
            state = self.directory.state(task.job)
            if state is not State.RUNNING:
                self.elsewhere.remove(task)
                self.waiting.append(task)

    def _request_stop(self, number: int, frame: object) -> None:
        if self.stop:  # asked a second time: no more patience
            self.slots.kill()
        self.stop = True

    def _stop_all(self) -> None:
        print(
            f"stopping {len(self.slots)} running jobs, which save where they are (once more to kill them)",
            file=sys.stderr,
            flush=True,
        )
        self.slots.stop(lambda: time.sleep(POLL_SECONDS))

    def _progress(self) -> float:
        """Jobs done, with the share of running ones that their records show."""
        ended = self.outcome.done + len(self.outcome.failures)
        return ended + sum(self._share(task.job) for task in self.slots.running())

    def _share(self, job: Job) -> float:
        return records.saved_step(self.directory.job_dir(job)) / (job.steps or get_dataset_class(job.dataset).N_STEPS)

    def _counts(self) -> str:
        parts = [f"{self.outcome.done} done", f"{len(self.slots)} running", f"{len(self.waiting)} waiting"]
        if self.elsewhere:
            parts.append(f"{len(self.elsewhere)} in another launch")
        if self.outcome.failures:
            parts.append(f"{len(self.outcome.failures)} failed")
        return ", ".join(parts)

    def _tell(self) -> None:
        if time.monotonic() - self.told_at < LOG_INTERVAL and (self.waiting or self.slots or self.elsewhere):
            return
        self.told_at = time.monotonic()
        share = self._progress() / self.total
        left = (time.monotonic() - self.began_at) * (1 / share - 1) if share > 0.02 else None
        when = f", about {left / 60:.0f} min left" if left else ""
        print(f"sweep: {self._counts()}; {share:.0%}{when}", file=sys.stderr, flush=True)
