"""The launcher `slurm`: job arrays, submitted through submitit.

submitit writes the batch script and talks to sbatch. Its pickled function calls are not used: a task runs a plain
command, `slurm_task`, which reads what to compute from a JSON file, and its states come from `slurm_batches`.
"""

from __future__ import annotations

import contextlib
import io
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_sfp.core import locks
from domainbed_sfp.core.errors import UserError, check_range
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.directory import WAY_ON, State, SweepDirectory
from domainbed_sfp.sweep.launchers.base import Outcome, Task, launcher

# Seconds before the time limit at which SLURM sends SIGUSR1: to end a step, evaluate nothing, and save.
SIGNAL_SECONDS = 120
# Seconds that a launch waits for another one to submit its jobs.
LOCK_SECONDS = 120.0
# SLURM's default for the longest array, where it does not say.
MAX_ARRAY_SIZE = 1001

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
# With a backslash in a log's name SLURM expands no pattern in it, and a script's line cannot hold a control character.
_UNWRITABLE = re.compile(r"[\\\x00-\x1f\x7f]")
_EXTRA = re.compile(r"(?:--)?(?P<name>[a-z][a-z0-9_-]*)(?:=(?P<value>[^\x00-\x1f]+))?")

# Options of sbatch that this launcher sets itself, and the flag for them where there is one.
_OURS = {
    "array": "--slurm_max_parallel", "account": "--slurm_account", "cpus-per-task": "--slurm_cpus", "dependency": "",
    "error": "", "gpus-per-node": "--slurm_gpus", "job-name": "", "mem": "--slurm_mem", "nodes": "", "ntasks": "",
    "ntasks-per-node": "", "open-mode": "", "output": "", "partition": "--slurm_partition", "requeue": "",
    "no-requeue": "", "signal": "", "time": "--slurm_time", "wait": "", "wrap": "",
}  # fmt: skip


@dataclass(frozen=True)
class SlurmOptions:
    """What each job asks SLURM for; None leaves it to the cluster's defaults.

    partition, account: sbatch's. gpus, cpus: per job. mem: per node, as sbatch writes it (`16G`). time: the limit of
    one turn, as sbatch writes it; a run that needs longer is requeued. max_parallel: jobs of a launch that run at the
    same time. max_retries: how often a job that died is launched again. extra: any other option of sbatch, as
    `qos=high` or, without a value, `exclusive`. setup: shell commands that run before a job.
    """

    partition: str | None = None
    account: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    mem: str | None = None
    time: str | None = None
    max_parallel: int | None = None
    max_retries: int = 3
    extra: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for values that cannot be."""
        for flag, least in (("slurm_gpus", 0), ("slurm_cpus", 1), ("slurm_max_parallel", 1), ("max_retries", 0)):
            # sbatch counts in 32 bits.
            check_range(f"--{flag}", getattr(self, flag.removeprefix("slurm_")), least, 2**31 - 1)
        if self.mem is not None and not _MEMORY.fullmatch(self.mem):
            raise UserError(f"--slurm_mem: expected a size such as 16G or 4000M, got {self.mem!r}")
        if self.time is not None:
            minutes(self.time)
        self.sbatch_options()

    def sbatch_options(self) -> dict[str, str | bool]:
        """What `extra` asks of sbatch, by option; raises UserError for what is no option, or is set otherwise."""
        options: dict[str, str | bool] = {}
        for text in self.extra:
            match = _EXTRA.fullmatch(text)
            if not match:
                raise UserError(f"--slurm_extra: expected OPTION=VALUE as in qos=high, or OPTION, got {text!r}")
            name = match["name"].replace("_", "-")
            if name in _OURS:
                way = f"; give {_OURS[name]}" if _OURS[name] else ""
                raise UserError(f"--slurm_extra {text}: this launcher sets {name} itself{way}")
            if name in options:
                raise UserError(f"--slurm_extra: {name} is given twice")
            options[name] = True if match["value"] is None else match["value"]
        return options


def minutes(text: str) -> int:
    """A time limit as sbatch writes it, in whole minutes, rounded up: `90`, `1:30:00`, `2-12`, `2-12:30`, ...

    Raises UserError for anything else, and for a limit of nothing.
    """
    match = _TIME.fullmatch(text.strip())
    if match:
        parts = [int(part) for part in match["parts"].split(":")]
        if match["days"]:
            hours, mins, seconds = [*parts, 0, 0][:3]
        elif len(parts) == 3:
            hours, mins, seconds = parts
        else:
            hours, (mins, seconds) = 0, [*parts, 0][:2]
        total = ((int(match["days"] or 0) * 24 + hours) * 60 + mins) * 60 + seconds
        if total > 0:
            return -(-total // 60)
    raise UserError(f"--slurm_time: expected minutes, H:MM:SS or D-HH:MM such as 90, 1:30:00 or 2-12:00, got {text!r}")


def check(options: SlurmOptions) -> None:
    """Raises UserError where the options cannot be, submitit is not installed, or SLURM is not here."""
    options.check()
    _submitit()
    for command in ("sbatch", "squeue", "srun"):
        if shutil.which(command) is None:
            raise UserError(
                f"--command_launcher slurm: {command} is not on PATH; launch from a login node of the cluster"
            )


@launcher("slurm")
def launch_slurm(
    tasks: Sequence[Task], directory: SweepDirectory, slots: int, options: SlurmOptions | None = None
) -> Outcome:
    """Submits the jobs that neither wait nor run, and returns without waiting for them.

    Jobs that died are told with their reasons, and submitted again unless that has been done `max_retries` times: then
    they are the outcome's failures. Raises UserError where SLURM refuses the first array or cannot be asked.
    """
    options = options or SlurmOptions()
    outcome = Outcome()
    with _alone(directory.path):
        standings = slurm_batches.look(directory.path)
        states = directory.states([task.job for task in tasks], standings)
        folders = directory.job_dirs([task.job for task in tasks])
        chosen = []
        for task in tasks:
            if states[task.job] in (State.DONE, State.RUNNING, State.PENDING):
                continue
            standing = standings.get(folders[task.job].name)
            if standing and standing.death:
                report = f"{task.job.describe()}\n{standing.death.describe()}"
                if standing.deaths > options.max_retries:
                    print(f"given up after {standing.deaths} deaths: {report}", file=sys.stderr)
                    outcome.failures.append((task.job, f"given up ({standing.death.how}); raise --max_retries"))
                    continue
                print(f"died, retry {standing.deaths} of {options.max_retries}: {report}", file=sys.stderr)
            chosen.append((folders[task.job], task.command))
        _submit(chosen, directory.path, options)
    return outcome


def _submit(tasks: list[tuple[Path, list[str]]], root: Path, options: SlurmOptions) -> None:
    size = _max_array_size()
    arrays: list[str] = []
    submitted = 0
    for begin in range(0, len(tasks), size):
        part = tasks[begin : begin + size]
        try:
            # Only one array after the other keeps the promise of max_parallel for all of them together.
            after = arrays[-1] if arrays and options.max_parallel else None
            arrays.append(submit_array(part, root, options, after))
        except UserError as error:
            if not arrays:
                raise
            print(
                f"SLURM takes no more than {submitted} of {len(tasks)} jobs now ({error}); launch again later",
                file=sys.stderr,
            )
            break
        submitted += len(part)
    if arrays:
        print(f"Submitted {submitted} jobs to SLURM as {', '.join(arrays)}; `sweep status --watch` shows them.")


def submit_array(
    tasks: list[tuple[Path, list[str]]], root: Path, options: SlurmOptions, after: str | None = None
) -> str:
    """Submits one array and returns its id."""
    submitit = _submitit()
    if unwritable := _UNWRITABLE.search(str(root.absolute())):
        raise UserError(
            f"output_dir {str(root)!r}: SLURM cannot write logs into a folder with {unwritable[0]!r} in its name; "
            "choose another --output_dir"
        )
    name = f"sfp-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(4)}"
    try:
        batch = slurm_batches.write_batch(root, name, tasks).absolute()
        # submitit expands patterns in the name of its folder too: it has one of its own, for the script alone.
        with tempfile.TemporaryDirectory(prefix="domainbed-sfp-") as scratch:
            executor = submitit.SlurmExecutor(scratch)
            executor.update_parameters(**_parameters(batch, len(tasks), options, after))
            executor.parameters["map_count"] = len(tasks)
            # submitit prints what sbatch says; it belongs into our one line.
            with contextlib.redirect_stderr(io.StringIO()):
                array = executor._submit_command(_command(batch, options)).job_id
            with contextlib.suppress(OSError):  # the jobs are SLURM's now; the script is for those who look
                for script in Path(scratch).glob("*.sh"):
                    shutil.copy(script, batch)
            return array
    except OSError as error:
        raise _unwritable(root, f"{slurm_batches.FOLDER}/{name}", error) from error
    except submitit.core.utils.FailedJobError as error:
        # A busy controller can have taken an array whose sbatch has run out of patience.
        for queued in slurm_batches.read_queue([name]).values():
            return queued.id.partition("_")[0]
        shutil.rmtree(batch)
        raise UserError(f"sbatch: {slurm_batches.one_line(str(error)) or 'it fails without a word'}") from None


def _command(batch: Path, options: SlurmOptions) -> str:
    """What the batch script runs for each task."""
    logs = _log_name(batch, "%A_%a_%t")
    srun = ["srun", "--unbuffered", "--output", f"{logs}.out", "--error", f"{logs}.err"]
    if options.cpus:
        # srun does not take over sbatch's cores per task since SLURM 22.05.
        srun.append(f"--cpus-per-task={options.cpus}")
    return shlex.join([*srun, sys.executable, "-u", "-m", "domainbed_sfp.sweep.launchers.slurm_task", str(batch)])


def _log_name(batch: Path, pattern: str) -> str:
    """The name of a log as SLURM wants it, less its suffix: a percent sign of the folder is none of a pattern."""
    return f"{str(batch).replace('%', '%%')}/{pattern}_log"


def _parameters(batch: Path, count: int, options: SlurmOptions, after: str | None) -> dict[str, Any]:
    """What submitit is told; it turns None into no flag."""
    logs = _log_name(batch, "%A_%a_0")
    limit = minutes(options.time) if options.time else None
    warning = SIGNAL_SECONDS if limit is None else min(SIGNAL_SECONDS, limit * 60 // 4)
    return {
        "job_name": batch.name,
        "partition": options.partition,
        "account": options.account,
        "gpus_per_node": options.gpus or None,
        "cpus_per_task": options.cpus,
        "mem": options.mem,
        "time": limit,
        "dependency": after and f"afterany:{after}",
        "array_parallelism": options.max_parallel or count,
        "setup": list(options.setup) or None,
        # Its own call of srun would name the logs without heed of percent signs.
        "use_srun": False,
        "additional_parameters": {
            "output": f"{logs}.out",
            "error": f"{logs}.err",
            "signal": f"USR1@{warning}",
            "requeue": True,
            **options.sbatch_options(),
        },
    }


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Between a look at the queue and sbatch no other launch may do the same."""
    lock = slurm_batches.launch_lock(root)
    with contextlib.ExitStack() as held:
        try:
            lock.parent.mkdir(exist_ok=True)
            held.enter_context(locks.hold(lock, LOCK_SECONDS, "submitting the jobs of this sweep", WAY_ON))
        except OSError as error:
            raise _unwritable(root, slurm_batches.FOLDER, error) from error
        yield


def _unwritable(root: Path, folder: str, error: OSError) -> UserError:
    return UserError(
        f"output_dir {str(root)!r}: the folder of SLURM's logs, {folder}, cannot be written: {error.strerror or error}"
    )


def _max_array_size() -> int:
    """How many tasks an array of this cluster may have."""
    try:
        told = slurm_batches.ask(["scontrol", "show", "config"], 60).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", told, re.MULTILINE)
    return int(match[1]) if match and int(match[1]) > 0 else MAX_ARRAY_SIZE


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError(
            "--command_launcher slurm needs submitit, which is not installed; pip install 'domainbed_sfp[slurm]'"
        ) from None
    return submitit
