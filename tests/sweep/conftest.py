"""SLURM's commands, stood in for, and a sweep to launch on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from stand_in_slurm import (
    SPEC,
    FakeSlurm,
)

from domainbed_sfp.sweep import slurm_batches


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    folder = tmp_path / "fake_slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakeSlurm(folder)


@pytest.fixture
def sweep(main, fake, tmp_path):
    """`sweep ACTION` of a spec of four jobs; launches go to SLURM, in arrays of three at most."""
    (tmp_path / "spec.yaml").write_text(SPEC)

    def run(action: str, *flags: object, launcher: str = "slurm", check: bool = True):
        chosen = ["--command_launcher", launcher, "--skip_confirmation"] if action == "launch" else []
        return main("sweep", action, "spec.yaml", "--output_dir", "out", *chosen, *flags, check=check)

    return run


@pytest.fixture
def task(fake, tmp_path, monkeypatch):
    """Runs a command as task 1 of an array does, and gives its status and note; `signalled` has it sent SIGUSR1."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    run_folder = tmp_path / "out" / "run"
    run_folder.mkdir(parents=True)

    def run(command: list[str], signalled: bool = False):
        batch = tmp_path / "out" / "slurm" / "batch"
        if not batch.exists():
            slurm_batches.write_batch(
                tmp_path / "out", "batch", [(tmp_path / "other", ["false"]), (run_folder, command)]
            )
        process = subprocess.Popen(
            [sys.executable, "-m", "domainbed_sfp.sweep.launchers.slurm_task", str(batch)], start_new_session=True,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if signalled:
            while not (run_folder / "began").exists():
                time.sleep(0.02)
            (run_folder / "began").unlink()
            os.killpg(process.pid, signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
        return process.returncode, slurm_batches.read_note(batch, 1), errors

    run.folder = run_folder
    return run
