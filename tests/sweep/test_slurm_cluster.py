"""Sweeps on a real SLURM cluster, which these tests start themselves where they can."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_on_this_machine as slurm_here

from domainbed_sfp.runs.records import VOLATILE_FIELDS
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.launchers import slurm
from domainbed_sfp.sweep.launchers.slurm import SlurmOptions

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'domainbed_sfp[slurm]'")
pytestmark = pytest.mark.skipif(slurm_here.why_not() is not None, reason=str(slurm_here.why_not()))

# Six jobs.
SPEC = """
datasets: [FullColoredDigits]
algorithms: [ERM, Magnitude]
test_envs: [[2]]
n_hparams: 1
n_trials: 3
steps: 31
checkpoint_freq: 10
skip_model_save: true
hparams: {batch_size: 16}
"""
STEPS = [0, 10, 20, 30]


@pytest.fixture
def cluster(monkeypatch):
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path must be short
    cluster = slurm_here.Cluster(folder)
    try:
        cluster.start()
        monkeypatch.setenv("SLURM_CONF", str(cluster.config))
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


# Waits for the signal that SLURM sends before the limit, then saves as a run does; has nothing to do once it has.
WAITING_RUN = """
import json, signal, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

checkpoint = Path(sys.argv[1]) / "checkpoint.safetensors"

def save(number, frame):
    header = json.dumps({"state": {"step": 7}})
    save_file({"nothing": np.zeros(1)}, checkpoint, metadata={"domainbed_sfp": header})
    sys.exit(128 + number)

if checkpoint.exists():
    (checkpoint.parent / "results.jsonl").write_text("{}\\n")
    (checkpoint.parent / "done").write_text("done")
    sys.exit(0)
signal.signal(signal.SIGUSR1, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
time.sleep(200)
"""


@pytest.mark.timeout(600)  # a minute on two idle cores
def test_a_sweep_with_a_job_killed_one_out_of_time_and_a_controller_restarted(cli, main, cluster, tmp_path):
    there = tmp_path / "on_slurm"
    there.mkdir()
    for place in (there, tmp_path):
        (place / "spec.yaml").write_text(SPEC)
    flags = ["spec.yaml", "--output_dir", "out"]
    array, waiting = submit_a_waiting_run(tmp_path)

    launched = cli("sweep", "launch", *flags, "--command_launcher", "slurm", "--slurm_time", "30", cwd=there)
    assert "Submitted 6 jobs to SLURM" in launched.stdout and "6 jobs: 0 done" in launched.stdout.splitlines()[-1]
    watch = subprocess.Popen(
        [sys.executable, "-m", "domainbed_sfp", "sweep", "status", *flags, "--watch", "1"],
        cwd=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # One job gets the signal that precedes a limit, in the middle of its run; another one dies.
        out_of_time = freeze_a_run(there / "out")
        killed = freeze_a_run(there / "out", but=out_of_time.name)
        queued = slurm_batches.look(there / "out")[out_of_time.name].queued
        cluster.ask("scancel", "--signal=USR1", queued.id)
        os.kill(out_of_time.pid, signal.SIGCONT)
        os.kill(killed.pid, signal.SIGKILL)
        cluster.stop_controller()
        time.sleep(1)
        cluster.start_controller()

        # Meanwhile, what the local launcher makes of the first trial, and single runs of the others.
        cli("sweep", "launch", *flags, "--n_trials", 1)
        dummy = main("sweep", "launch", *flags, "--command_launcher", "dummy").stdout
        commands = [shlex.split(line)[3:] for line in dummy.splitlines() if " domainbed_sfp train " in line]
        assert len(commands) == 4
        for command in commands:
            main(*command)
        printed, errors = watch.communicate(timeout=300)
    finally:
        watch.kill()
    assert watch.returncode == 1, printed + errors
    assert printed.splitlines()[-1] == "6 jobs: 5 done, 0 incomplete, 0 not launched, 1 failed."
    assert "killed by SIGKILL" in errors

    relaunched = cli("sweep", "launch", *flags, "--command_launcher", "slurm", cwd=there)
    assert "died, retry 1 of 3: FullColoredDigits" in relaunched.stderr and "killed by SIGKILL" in relaunched.stderr
    assert "Submitted 1 jobs" in relaunched.stdout
    again = cli("sweep", "launch", *flags, "--command_launcher", "slurm", cwd=there)
    assert "About to launch 0 jobs." in again.stdout and "Submitted" not in again.stdout
    assert "6 jobs: 6 done" in cli("sweep", "status", *flags, "--watch", "0.5", cwd=there).stdout

    folders = [path.parent for path in (there / "out").glob("*/done")]
    assert len(folders) == 6
    for folder in folders:
        told = (folder / "out.txt").read_text()
        was_stopped = folder.name in (out_of_time.name, killed.name)
        assert told.count("HParams:") == (2 if was_stopped else 1)
        assert told.count("Continuing at step") == was_stopped
        ours, theirs = (records(root / "out" / folder.name) for root in (there, tmp_path))
        assert [json.loads(record)["step"] for record in ours] == STEPS
        assert ours == theirs
    handed_over = Counter(
        Path(task["folder"]).name
        for tasks in (there / "out" / "slurm").glob("*/tasks.json")
        for task in json.loads(tasks.read_text())["tasks"]
    )
    assert handed_over == {folder.name: 2 if folder.name == killed.name else 1 for folder in folders}
    assert (out_of_time.folder / "err.txt").read_text().count("SIGUSR1: saving and stopping") == 1

    # SLURM's own limit: signalled, saved, requeued, and done in the second turn.
    cluster.wait(lambda: (waiting / "run" / "done").exists(), seconds=120)
    cluster.wait(lambda: f"{array}_0" not in cluster.ask("squeue", "--noheader", "--array", "--format=%i").split())
    assert slurm_batches.look(waiting)["run"] == slurm_batches.Standing()
    assert not list(tmp_path.rglob("*.pkl"))


def submit_a_waiting_run(tmp_path: Path) -> tuple[str, Path]:
    """A task beside the sweep that does nothing but wait for the end of its minute: its array and its sweep folder."""
    folder = tmp_path / "waiting"
    (folder / "run").mkdir(parents=True)
    script = tmp_path / "waiting.py"
    script.write_text(WAITING_RUN)
    tasks = [(folder / "run", [sys.executable, str(script), str(folder / "run")])]
    return slurm.submit_array(tasks, folder, SlurmOptions(time="1")), folder


@dataclass(frozen=True)
class Run:
    """A job's folder and process."""

    folder: Path
    pid: int

    @property
    def name(self) -> str:
        return self.folder.name


def freeze_a_run(out: Path, but: str = "") -> Run:
    """Finds a run that has a checkpoint and is not yet done, and stops its process where it is."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for run in running(out):
            if run.name == but or not (run.folder / "checkpoint.safetensors").exists():
                continue
            os.kill(run.pid, signal.SIGSTOP)
            if not (run.folder / "done").exists():
                return run
            os.kill(run.pid, signal.SIGCONT)
        time.sleep(0.02)
    raise AssertionError("no run was met in its middle")


def running(out: Path) -> list[Run]:
    """The processes that compute runs of a sweep."""
    runs = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if words[1:4] == ["-m", "domainbed_sfp", "train"] and (process / "cwd").resolve() == out.parent:
                runs.append(Run(out.parent / words[words.index("--output_dir") + 1], int(process.name)))
    return runs


def records(folder: Path) -> list[str]:
    """The records without what may differ, as they are written."""
    lines = []
    for line in (folder / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        lines.append(json.dumps({name: value for name, value in record.items() if name not in VOLATILE_FIELDS}))
    return lines
