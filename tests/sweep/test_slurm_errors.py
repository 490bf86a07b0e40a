"""What SLURM refuses, and flags that cannot be."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
from filelock import FileLock
from stand_in_slurm import (
    SPEC,
    batches,
)
from told_errors import assert_one_line_error

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.sweep import slurm_batches
from domainbed_sfp.sweep.launchers import slurm

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'domainbed_sfp[slurm]'")


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
