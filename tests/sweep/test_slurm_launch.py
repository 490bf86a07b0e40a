"""Launches on SLURM and the states of their jobs, its commands stood in for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in_slurm import (
    batch_of,
    batches,
    end_all,
    finish,
    folder_of,
    read_spec_of,
)
from told_errors import assert_one_line_error

from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.slurm_batches import Note
from domainbed_sfp.sweep.spec import make_jobs

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'domainbed_sfp[slurm]'")


# Launching ----------------------------------------------------------------------------------------------------


def test_a_launch_submits_arrays_and_the_next_one_nothing(sweep, fake, tmp_path):
    launched = sweep(
        "launch", "--slurm_partition", "gpu", "--slurm_account", "lab", "--slurm_gpus", 1, "--slurm_cpus", 4,
        "--slurm_mem", "16G", "--slurm_time", "1:30:00",
    )  # fmt: skip
    assert "Submitted 4 jobs to SLURM as 100, 101" in launched.stdout
    assert "4 jobs: 0 done, 0 incomplete, 0 not launched, 4 pending." in launched.stdout
    assert [re.findall(r"--array=(\S+)", script) for script in fake.scripts] == [["0-2%3"], ["0-0%1"]]
    for flag in (
        "--partition=gpu", "--account=lab", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=16G", "--time=90",
        "--signal=USR1@120", "--requeue", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {flag}\n" in fake.scripts[0]
    # The array computes what a local launch would, each job once.
    printed = sweep("launch", launcher="dummy").stdout
    assert "4 jobs are in SLURM's queue and left to it." in printed
    tasks = [task for batch in batches(tmp_path) for task in slurm_batches.read_tasks(batch)]
    assert len({task["folder"] for task in tasks}) == 4
    assert all(task["command"][1:4] == ["-m", "domainbed_sfp", "train"] for task in tasks)
    again = sweep("launch")
    assert "About to launch 0 jobs." in again.stdout and len(fake.scripts) == 2
    assert not list((tmp_path / "out").rglob("*.pkl"))


def test_what_is_not_given_is_left_to_the_cluster(sweep, fake):
    sweep("launch")
    for flag in ("partition", "account", "gpus", "cpus", "mem", "time", "dependency"):
        assert f"#SBATCH --{flag}" not in fake.scripts[0]


def test_max_parallel_holds_for_all_arrays_of_a_launch(sweep, fake):
    sweep("launch", "--slurm_max_parallel", 2)
    assert "--array=0-2%2\n" in fake.scripts[0] and "--array=0-0%1\n" in fake.scripts[1]
    assert "dependency" not in fake.scripts[0] and "--dependency=afterany:100\n" in fake.scripts[1]


def test_jobs_that_are_done_or_computed_elsewhere_are_not_submitted(sweep, fake, tmp_path):
    jobs = make_jobs(read_spec_of(tmp_path), None)
    directory = SweepDirectory(tmp_path / "out")
    for job in jobs[:2]:
        directory.job_dir(job).mkdir(parents=True)
    finish(directory.job_dir(jobs[0]))
    code = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(directory.job_dir(jobs[1]) / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            assert "Submitted 2 jobs" in sweep("launch").stdout
        finally:
            holder.kill()
    submitted = {task["folder"] for batch in batches(tmp_path) for task in slurm_batches.read_tasks(batch)}
    assert {Path(folder).name for folder in submitted} == {directory.job_dir(job).name for job in jobs[2:]}


def test_a_launch_that_died_around_sbatch_loses_and_repeats_nothing(sweep, fake, tmp_path):
    sweep("launch")
    # Died before sbatch: the batch was never submitted. Died after it: the queue knows it by its name.
    fake.empty_queue()
    assert "4 jobs: 0 done, 0 incomplete, 4 not launched." in sweep("status").stdout
    sweep("launch")
    for path in (tmp_path / "out" / "slurm").glob("*/*_submission.sh"):
        path.unlink()
    assert "About to launch 0 jobs." in sweep("launch").stdout
    assert len(fake.queue) == 4


def test_a_local_launch_leaves_the_queue_to_slurm(sweep, fake, tmp_path):
    sweep("launch")
    launched = sweep("launch", launcher="local")
    assert "4 jobs are in SLURM's queue" in launched.stdout and "About to launch 0 jobs." in launched.stdout
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name != "slurm"]


# States -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "queued, state",
    [
        ("PENDING", "Pending"), ("REQUEUED", "Pending"), ("REQUEUE_HOLD", "Pending"), ("RUNNING", "Running"),
        ("COMPLETING", "Running"), ("SUSPENDED", "Running"), ("COMPLETED", "Not launched"),
        ("CANCELLED", "Not launched"), ("NODE_FAIL", "Failed"),
    ],
)  # fmt: skip
def test_states_come_from_the_queue_and_the_disk(sweep, fake, tmp_path, queued, state):
    sweep("launch")
    fake.set_state(0, queued)
    name = folder_of(batch_of(tmp_path, "101"), 0).name
    line = next(line for line in sweep("status").stdout.splitlines() if name in line)
    assert line.startswith(f"{state}: ")
    (tmp_path / "out" / name).mkdir()
    finish(tmp_path / "out" / name)
    line = next(line for line in sweep("status").stdout.splitlines() if name in line)
    assert line.startswith("Done: ")


@pytest.mark.parametrize(
    "note, broken, how",
    [
        (Note(137), None, "killed by SIGKILL"),
        (Note(2), None, "exit status 2"),
        (Note(None), None, "killed with its node or by SLURM"),
        (Note(None), "OUT_OF_MEMORY", "killed with its node or by SLURM (OUT_OF_MEMORY)"),
        (Note(138, 0, "no step was saved within the time limit"), None, "no step was saved within the time limit"),
    ],
)
def test_deaths_are_told_and_launched_again(sweep, fake, tmp_path, note, broken, how):
    sweep("launch")
    end_all(fake, tmp_path, note, "a first line\nits last words\n")
    if broken:
        for array, count in (("100", 3), ("101", 1)):
            name = batch_of(tmp_path, array).name
            with open(fake.root / "queue", "a") as queue:
                queue.writelines(f"{array}|{index}|{name}|{broken}|None\n" for index in range(count))
    status = sweep("status")
    assert "4 jobs: 0 done, 0 incomplete, 0 not launched, 4 failed." in status.stdout
    assert status.stdout.count(how) == 4
    again = sweep("launch")
    assert again.stderr.count("died, retry 1 of 3: FullColoredDigits") == 4
    assert how in again.stderr and "its last words" in again.stderr and "_0_log.err ends with:" in again.stderr
    assert "Submitted 4 jobs" in again.stdout and "4 pending" in again.stdout


@pytest.mark.parametrize("status", [0, 75, 130, 138, 143])
def test_ends_that_lose_nothing_are_no_deaths(sweep, fake, tmp_path, status):
    sweep("launch")
    end_all(fake, tmp_path, Note(status, 5))
    for batch in batches(tmp_path):
        for task in slurm_batches.read_tasks(batch):
            Path(task["folder"]).mkdir()
    assert "4 jobs: 0 done, 4 incomplete, 0 not launched." in sweep("status").stdout
    again = sweep("launch", "--max_retries", 0)
    assert "Submitted 4 jobs" in again.stdout and "died" not in again.stderr


def test_retries_end_and_deleting_gives_them_back(sweep, fake, tmp_path):
    for retry in range(3):
        launched = sweep("launch", "--max_retries", 2)
        assert "Submitted 4 jobs" in launched.stdout
        assert launched.stderr.count(f"died, retry {retry} of 2") == (4 if retry else 0)
        end_all(fake, tmp_path, Note(137))
    given_up = sweep("launch", "--max_retries", 2, check=False)
    assert given_up.returncode == 1 and "Submitted" not in given_up.stdout
    assert given_up.stderr.count("given up after 3 deaths") == 4
    assert "given up (killed by SIGKILL); raise --max_retries" in given_up.stderr
    assert "Submitted 4 jobs" in sweep("launch", "--max_retries", 3).stdout
    end_all(fake, tmp_path, Note(137))
    assert "Deleted 4 jobs!" in sweep("delete_incomplete", "--skip_confirmation").stdout
    launched = sweep("launch", "--max_retries", 0)
    assert "Submitted 4 jobs" in launched.stdout and "died" not in launched.stderr


def test_a_job_that_could_not_start_is_told_with_its_log(sweep, fake, tmp_path):
    sweep("launch")
    (batch_of(tmp_path, "101") / "101_0_0_log.err").write_text("python3: No such file or directory\n")
    fake.empty_queue()
    assert "1 failed" in sweep("status").stdout
    again = sweep("launch")
    assert "it did not start" in again.stderr and "No such file or directory" in again.stderr


def test_jobs_in_the_queue_are_not_deleted(sweep, fake, tmp_path):
    sweep("launch")
    for batch in batches(tmp_path):
        for task in slurm_batches.read_tasks(batch):
            Path(task["folder"]).mkdir()
    assert "Deleted 0 jobs!" in sweep("delete_incomplete", "--skip_confirmation").stdout
    (fake.root / "down").touch()
    refused = sweep("delete_incomplete", "--skip_confirmation", check=False)
    assert_one_line_error(refused, "Unable to contact slurm controller")


def test_a_controller_that_is_away(sweep, fake):
    sweep("launch")
    (fake.root / "down").touch()
    status = sweep("status")
    assert "states are from disk alone" in status.stderr and "4 not launched" in status.stdout
    refused = sweep("launch", check=False)
    assert_one_line_error(refused, "squeue does not answer", "Unable to contact slurm controller")
    assert len(fake.scripts) == 2
