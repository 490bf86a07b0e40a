"""What a task of an array does, and watching a sweep on SLURM."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import Command
from rich.console import Console
from safetensors.numpy import save_file
from stand_in_slurm import (
    batch_of,
    batches,
    end_all,
    finish,
    folder_of,
    read_spec_of,
)

from domainbed_sfp.runs import records
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.launchers import slurm_task
from domainbed_sfp.sweep.slurm_batches import Note
from domainbed_sfp.sweep.spec import make_jobs
from domainbed_sfp.sweep.watch import Watch

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'domainbed_sfp[slurm]'")


# What a task does ---------------------------------------------------------------------------------------------

# Saves at step sys.argv[2] when its time is up; takes its time to listen.
RUN = """
import json, signal, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

def save(number, frame):
    metadata = {"domainbed_sfp": json.dumps({"state": {"step": int(sys.argv[2])}})}
    save_file({"nothing": np.zeros(1)}, Path(sys.argv[1]) / "checkpoint.safetensors", metadata=metadata)
    sys.exit(128 + number)

Path(sys.argv[1], "began").touch()
time.sleep(0.5)
signal.signal(signal.SIGUSR1, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
time.sleep(60)
"""


@pytest.mark.parametrize(
    "code, status", [("pass", 0), ("raise SystemExit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_a_task_notes_how_its_run_ended(task, code, status):
    ended, note, _ = task([sys.executable, "-c", code])
    assert ended == status and note == Note(status)


def test_a_task_whose_time_is_up_is_requeued_while_it_gets_on(task, fake, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    # The signal comes while the run does not listen yet: it neither kills it nor gets lost.
    status, note, errors = task([sys.executable, str(script), str(task.folder), "5"], signalled=True)
    assert (status, note) == (138, Note(138, 5)), errors
    assert (fake.root / "requeued").read_text() == "requeue 7_1"
    (fake.root / "requeued").unlink()
    # The next turn has not made a step.
    status, note, errors = task([], signalled=True)
    assert status == 138 and note.exit == 138 and "no step was saved within the time limit" in note.why
    assert "raise --slurm_time" in errors and not (fake.root / "requeued").exists()


def test_a_requeue_that_slurm_refuses_is_told(task, fake, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    (fake.root / "refusal").write_text("Requested operation is presently disabled for job 7_1")
    command = [sys.executable, str(tmp_path / "run.py"), str(task.folder), "5"]
    status, note, errors = task(command, signalled=True)
    assert (status, note) == (138, Note(138, 5))
    assert "presently disabled" in errors and "the next launch continues it" in errors


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "8"}, "4"),
        ({"SLURM_CPUS_ON_NODE": "8"}, "8"),
        ({"OMP_NUM_THREADS": "2", "SLURM_CPUS_ON_NODE": "8"}, "2"),
    ],
)
def test_threads_are_the_cores_slurm_gives(environment, threads):
    given = slurm_task.thread_environment(environment)
    assert given["OMP_NUM_THREADS"] == given["MKL_NUM_THREADS"] == threads


def test_a_run_saves_at_sigusr1_and_continues(main, tmp_path):
    flags = [
        "train", "--dataset", "FullColoredDigits", "--test_envs", "2", "--steps", "201", "--checkpoint_freq", "200",
        "--skip_model_save", "--hparams", '{"batch_size": 16}', "--output_dir", "run",
    ]  # fmt: skip
    process = Command(*flags, folder=tmp_path)
    while not (tmp_path / "run" / "results.jsonl").exists():
        assert process.returncode is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # as SLURM may when it preempts: the save goes on
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (138, 143) and "continues there" in errors and "Traceback" not in errors
    assert 0 < records.saved_step(tmp_path / "run") <= 200
    main(*flags)
    assert "Continuing at step" in (tmp_path / "run" / "out.txt").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert steps == [0, 200]


# Watching -----------------------------------------------------------------------------------------------------


def test_a_watch_in_a_log_tells_changes_and_ends_with_the_queue(sweep, fake, tmp_path, monkeypatch):
    sweep("launch")
    end_all(fake, tmp_path, Note(2), "error: it diverged\n")
    watched = sweep("status", "--watch", 0.1, check=False)
    assert watched.returncode == 1
    assert watched.stdout.splitlines() == ["4 jobs: 0 done, 0 incomplete, 0 not launched, 4 failed."]
    assert watched.stderr.count("failed: FullColoredDigits") == 4 and "exit status 2" in watched.stderr
    for batch in batches(tmp_path):
        for task in slurm_batches.read_tasks(batch):
            Path(task["folder"]).mkdir()
            finish(Path(task["folder"]))
    assert sweep("status", "--watch", 0.1).stdout.splitlines() == ["4 jobs: 4 done, 0 incomplete, 0 not launched."]


def test_the_table_of_a_watch(sweep, fake, tmp_path, monkeypatch):
    sweep("launch")
    fake.set_state(0, "RUNNING")
    fake.set_state(0, "NODE_FAIL", array="100")
    running = folder_of(batch_of(tmp_path, "101"), 0)
    running.mkdir()
    save_file({}, running / records.CHECKPOINT, {"domainbed_sfp": json.dumps({"state": {"step": 6}})})
    jobs = make_jobs(read_spec_of(tmp_path), None)
    watch = Watch(SweepDirectory(tmp_path / "out"), jobs, 1)
    text = io.StringIO()
    Console(file=text, width=160).print(watch.table(watch.look()))
    shown = text.getvalue()
    assert "4 jobs: 0 done, 0 incomplete, 0 not launched, 1 running, 2 pending, 1 failed." in shown
    assert (
        'FullColoredDigits Magnitude test 2 hparams 0 trial 0 {"batch_size": 16, "sparsity": 0.3}: step 6 of 11'
        in shown
    )
    assert "(SLURM job 101_0)" in shown and "it did not start (NODE_FAIL)" in shown
    row = next(line for line in shown.splitlines() if line.split("│")[1:2] == [" FullColoredDigits "] and "ERM" in line)
    assert [cell.strip() for cell in row.split("│")[3:-1]] == ["", "", "", "", "1", "1"]
    # The controller goes away for a while: what was known stands, and the table says so.
    (fake.root / "down").touch()
    text = io.StringIO()
    Console(file=text, width=160).print(watch.table(watch.look()))
    assert "1 running, 2 pending" in text.getvalue() and "asking again" in text.getvalue()
