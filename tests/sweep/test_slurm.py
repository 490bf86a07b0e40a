"""Sweeps on SLURM, as far as they can be tested without one: its commands are stood in for by small scripts."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from filelock import FileLock
from processes import Command
from rich.console import Console
from safetensors.numpy import save_file
from told_errors import assert_one_line_error

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs import records
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.launchers import slurm, slurm_task
from domainbed_sfp.sweep.slurm_batches import Note
from domainbed_sfp.sweep.spec import make_jobs, read_spec
from domainbed_sfp.sweep.watch import Watch

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'domainbed_sfp[slurm]'")

SPEC = """
datasets: [FullColoredDigits]
algorithms: [ERM, {name: Magnitude, hparams: {sparsity: 0.3}}]
test_envs: [[1], [2]]
n_hparams: 1
n_trials: 1
steps: 11
hparams: {batch_size: 16}
"""

# sbatch notes the script and puts the tasks of its array into the queue; squeue prints the queue, if it has an answer.
SBATCH = """
import re, sys
from pathlib import Path
root = Path(__file__).parent
refusal = root / "refusal"
scripts = sorted(root.glob("script*"))
if refusal.exists() and len(scripts) >= int(refusal.read_text().split("|")[0]):
    sys.exit(refusal.read_text().split("|")[1])
text = Path(sys.argv[1]).read_text()
array = 100 + len(scripts)
(root / f"script{array}").write_text(text)
name = re.search("--job-name=(.*)", text)[1]
last = int(re.search(r"--array=0-(\\d+)%", text)[1])
with open(root / "queue", "a") as queue:
    for index in range(last + 1):
        queue.write(f"{array}|{index}|{name}|PENDING|Priority\\n")
if (root / "impatient").exists():
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
print(f"Submitted batch job {array}")
"""
SQUEUE = """
import sys
from pathlib import Path
root = Path(__file__).parent
if (root / "down").exists():
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
names = next(flag.partition("=")[2] for flag in sys.argv if flag.startswith("--name=")).split(",")
queue = root / "queue"
for line in queue.read_text().splitlines() if queue.exists() else []:
    if line.split("|")[2] in names:
        print(line)
"""
SCONTROL = """
import sys
from pathlib import Path
root = Path(__file__).parent
if sys.argv[1:] == ["show", "config"]:
    print("MaxArraySize            = 3\\nMaxJobCount = 10000")
elif (root / "refusal").exists():
    sys.exit((root / "refusal").read_text())
else:
    (root / "requeued").write_text(" ".join(sys.argv[1:]))
"""


class FakeSlurm:
    """The commands on PATH, and what they know."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL), ("srun", "")):
            (root / name).write_text(f"#!{sys.executable}\n{text}")
            (root / name).chmod(0o755)

    @property
    def scripts(self) -> list[str]:
        return [path.read_text() for path in sorted(self.root.glob("script*"))]

    @property
    def queue(self) -> list[list[str]]:
        file = self.root / "queue"
        return [line.split("|") for line in file.read_text().splitlines()] if file.exists() else []

    def set_state(self, index: int, state: str, reason: str = "None", array: str | None = None) -> None:
        """Of a task, by its place in the queue's last array unless `array` is given."""
        rows = self.queue
        array = array or rows[-1][0]
        for row in rows:
            if row[:2] == [array, str(index)]:
                row[3:] = [state, reason]
        (self.root / "queue").write_text("".join("|".join(row) + "\n" for row in rows))

    def empty_queue(self) -> None:
        (self.root / "queue").write_text("")


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


def finish(folder: Path) -> None:
    """What a run that is done leaves."""
    (folder / "results.jsonl").write_text("{}\n")
    (folder / "done").write_text("done")


def batches(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in (tmp_path / "out" / "slurm").glob("*/tasks.json"))


def folder_of(batch: Path, index: int) -> Path:
    return Path(slurm_batches.read_tasks(batch)[index]["folder"])


def batch_of(tmp_path: Path, array: str) -> Path:
    return next(batch for batch in batches(tmp_path) if (batch / f"{array}_submission.sh").exists())


def end_all(fake: FakeSlurm, tmp_path: Path, note: Note, log: str = "") -> None:
    """All tasks leave the queue in the same manner."""
    for array, index, *_ in fake.queue:
        batch = batch_of(tmp_path, array)
        slurm_batches.write_note(batch, int(index), note)
        (batch / f"{array}_{index}_0_log.err").write_text(log)
    fake.empty_queue()


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
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(directory.job_dir(jobs[1]) / "run.lock")], stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        assert "Submitted 2 jobs" in sweep("launch").stdout
    finally:
        holder.kill()
        holder.wait()
    submitted = {task["folder"] for batch in batches(tmp_path) for task in slurm_batches.read_tasks(batch)}
    assert {Path(folder).name for folder in submitted} == {directory.job_dir(job).name for job in jobs[2:]}


def read_spec_of(tmp_path: Path):
    return read_spec(str(tmp_path / "spec.yaml"))


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


# Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("90", 90), ("90:30", 91), ("1:30:00", 90), ("0:0:1", 1), ("2-0", 2880), ("2-12", 3600), ("2-12:30", 3630),
        ("1-0:0:1", 1441),
    ],
)  # fmt: skip
def test_time_limits_are_sbatchs(text, expected):
    assert slurm.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1h", "0", "1:2:3:4", "-5", "1-", "2-1:2:3:4", "1.5"])
def test_bad_time_limits(text):
    with pytest.raises(UserError, match="--slurm_time: expected minutes, H:MM:SS or D-HH:MM"):
        slurm.minutes(text)


@pytest.mark.parametrize(
    "flags, parts",
    [
        (("--slurm_time", "1h"), ("--slurm_time", "'1h'")),
        (("--slurm_mem", "lots"), ("--slurm_mem", "16G", "'lots'")),
        (("--slurm_cpus", 0), ("--slurm_cpus", "at least 1", "0")),
        (("--slurm_gpus", -1), ("--slurm_gpus", "at least 0")),
        (("--slurm_max_parallel", 0), ("--slurm_max_parallel", "at least 1")),
        (("--max_retries", -1), ("--max_retries", "at least 0")),
        (("--jobs", 2), ("--jobs", "--slurm_max_parallel")),
        (("--watch",), ("--watch", "sweep status")),
    ],
)
def test_bad_flags(sweep, tmp_path, flags, parts):
    assert_one_line_error(sweep("launch", *flags, check=False), *parts)
    assert not (tmp_path / "out").exists()


def test_flags_of_slurm_go_with_slurm(sweep):
    error = sweep("launch", "--slurm_partition", "gpu", launcher="local", check=False)
    assert_one_line_error(error, "--slurm_partition", "--command_launcher slurm")
    assert_one_line_error(sweep("status", "--watch", 0, check=False), "--watch", "above 0")


@pytest.mark.parametrize("command", ["sbatch", "squeue", "srun"])
def test_no_slurm_here(sweep, fake, monkeypatch, command):
    (fake.root / command).unlink()
    monkeypatch.setenv("PATH", str(fake.root))
    assert_one_line_error(sweep("launch", check=False), f"{command} is not on PATH")


def test_no_submitit(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert_one_line_error(sweep("launch", check=False), "submitit", "pip install 'domainbed_sfp[slurm]'")


def test_what_sbatch_refuses_is_passed_on_and_leaves_nothing(sweep, fake, tmp_path):
    words = "sbatch: error: invalid partition specified: nowhere\nsbatch: error: Batch job submission failed: Invalid partition name specified\n"
    (fake.root / "refusal").write_text(f"0|{words}")
    refused = sweep("launch", "--slurm_partition", "nowhere", check=False)
    assert_one_line_error(refused, "sbatch: invalid partition specified: nowhere; Batch job submission failed")
    assert not batches(tmp_path)


def test_an_array_that_was_taken_although_sbatch_gave_up_waiting(sweep, fake):
    (fake.root / "impatient").touch()
    assert "Submitted 4 jobs to SLURM as 100, 101" in sweep("launch").stdout
    assert "About to launch 0 jobs." in sweep("launch").stdout


def test_a_cluster_that_takes_only_some(sweep, fake):
    (fake.root / "refusal").write_text("1|sbatch: error: Batch job submission failed: job submit limit\n")
    launched = sweep("launch")
    assert "Submitted 3 jobs to SLURM as 100;" in launched.stdout
    assert (
        "SLURM takes no more than 3 of 4 jobs now (sbatch: Batch job submission failed: job submit limit)"
        in launched.stderr
    )
    (fake.root / "refusal").unlink()
    assert "Submitted 1 jobs" in sweep("launch").stdout


def test_a_log_folder_that_cannot_be_written(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "slurm").write_text("in the way")
    assert_one_line_error(sweep("launch", check=False), "'out'", "the folder of SLURM's logs", "cannot be written")


def test_two_launches_do_not_submit_at_once(sweep, tmp_path, monkeypatch):
    (tmp_path / "out" / "slurm").mkdir(parents=True)
    monkeypatch.setattr(slurm, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / "out" / "slurm" / "launch.lock"):
        assert_one_line_error(sweep("launch", check=False), "another process is submitting")


def test_a_damaged_list_of_tasks_is_named(sweep, tmp_path):
    sweep("launch")
    (batches(tmp_path)[0] / "tasks.json").write_text(textwrap.dedent("{"))
    slurm_batches.job_names.cache_clear()
    assert_one_line_error(sweep("status", check=False), "tasks.json", "not a list of tasks")


@pytest.mark.parametrize("folder", ["plain", "with space", "pct%j", "%A_%%", "it's", 'a"b'])
def test_logs_lie_in_the_folder_whatever_its_name(main, fake, tmp_path, folder):
    """SLURM expands patterns in names of logs, the folder's included; and a script's line is quoted."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    launched = ["--command_launcher", "slurm", "--skip_confirmation"]
    main("sweep", "launch", "spec.yaml", "--output_dir", folder, *launched)
    script = fake.scripts[0]
    batch = tmp_path / folder / "slurm" / re.search("--job-name=(.*)", script)[1]
    assert batch.is_dir()
    for kind in ("output", "error"):
        (written,) = shlex.split(re.search(f"^#SBATCH --{kind}=(.*)", script, re.M)[1])
        assert Path(written).parent == Path(str(batch).replace("%", "%%"))
    words = shlex.split(script.splitlines()[-1])
    assert words[0] == "srun" and Path(words[words.index("--output") + 1]).parent == Path(written).parent
    assert str(batch) in words and len(list(batch.glob("*submission.sh"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"spec.yaml", "fake_slurm", folder}


@pytest.mark.parametrize("folder", ["back\\slash", "line\nend"])
def test_folders_that_slurm_cannot_write_logs_into_are_refused(main, fake, tmp_path, folder):
    (tmp_path / "spec.yaml").write_text(SPEC)
    launched = ["--command_launcher", "slurm", "--skip_confirmation"]
    refused = main("sweep", "launch", "spec.yaml", "--output_dir", folder, *launched, check=False)
    assert refused.returncode == 2 and "SLURM cannot write logs" in refused.stderr and refused.stderr.count("\n") == 1


def test_any_option_of_sbatch_and_commands_before_a_job(sweep, fake):
    sweep(
        "launch",
        "--slurm_extra",
        "qos=high",
        "constraint=a100|h100",
        "exclusive",
        "--slurm_setup",
        "module load cuda",
        "a=b",
    )
    script = fake.scripts[0]
    for line in (
        "#SBATCH --qos=high",
        "#SBATCH --constraint='a100|h100'",
        "#SBATCH --exclusive",
        "module load cuda",
        "a=b",
    ):
        assert line in script.splitlines()
    assert script.index("module load cuda") < script.index("srun")


@pytest.mark.parametrize(
    "extra, part",
    [
        ("output=x", "sets output itself"), ("time=3", "give --slurm_time"), ("cpus_per_task=2", "give --slurm_cpus"),
        ("qos=", "expected OPTION=VALUE"), ("QOS", "expected OPTION=VALUE"), ("a b", "expected OPTION=VALUE"),
        ("qos=a\nb", "expected OPTION=VALUE"),
    ],
)  # fmt: skip
def test_options_of_sbatch_that_cannot_be(sweep, extra, part):
    refused = sweep("launch", "--slurm_extra", extra, check=False)
    assert refused.returncode == 2 and part in refused.stderr and refused.stderr.count("\n") == 1
