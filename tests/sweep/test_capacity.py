"""How many jobs a machine runs at the same time."""

from __future__ import annotations

import pytest
from told_errors import assert_one_line_error

from domainbed_sfp.sweep import capacity, commands
from domainbed_sfp.sweep.capacity import Slots, choose_slots
from domainbed_sfp.sweep.launchers.base import LAUNCHERS
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs

GIB = 2**30


def jobs_of(dataset: str = "FullColoredDigits", trials: int = 3, **hparams):
    return make_jobs(
        SweepSpec([dataset], ["ERM"], n_hparams=1, n_trials=trials, test_envs=[[0], [1]], hparams=hparams), None
    )


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_a_job_for_each_core_as_far_as_jobs_and_memory_go():
    digits, photographs = jobs_of(), jobs_of("PACS", backbone="efficientnet_lite0", image_size=128, batch_size=16)
    assert choose_slots(digits, 2, 16 * GIB, []) == Slots(2, "2 cores")
    assert choose_slots(digits, 64, 256 * GIB, []).jobs == 6
    assert choose_slots(digits[:1], 64, None, []) == Slots(1, "1 jobs in all")
    # 3 environments x 16 images of 128 px: 4 GiB each.
    assert choose_slots(photographs, 8, 16 * GIB, []) == Slots(3, "16 GiB of memory, of which each may take 4.0")
    assert choose_slots(photographs, 8, 2 * GIB, []).jobs == 1
    assert choose_slots(jobs_of("PACS", image_size=224), 8, 64 * GIB, []).jobs < 4


def test_the_users_threads_and_gpus_decide(monkeypatch):
    assert choose_slots(jobs_of(), 16, None, ["0", "3"]) == Slots(2, "one for each of 2 GPUs")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert choose_slots(jobs_of(), 16, None, []) == Slots(2, "16 cores, OMP_NUM_THREADS=8")
    assert choose_slots(jobs_of(), 4, None, []).jobs == 1


@pytest.mark.parametrize(
    "files, cores",
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "strange\n"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_share_of_cpu_time_counts(monkeypatch, tmp_path, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    monkeypatch.setattr(capacity.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert capacity.usable_cores() == cores


@pytest.mark.parametrize("text, expected", [("4294967296\n", 4 * GIB), ("max\n", None), (f"{2**62}\n", None)])
def test_a_containers_memory_counts(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    everything = capacity.usable_memory()
    (tmp_path / "memory.max").write_text(text)
    assert capacity.usable_memory() == min(expected or everything, everything)


def test_a_launch_says_what_it_chose(main, tmp_path, monkeypatch):
    started = []
    monkeypatch.setitem(LAUNCHERS.entries, "local", lambda tasks, directory, slots: started.append(slots) or _Done)
    monkeypatch.setattr(commands, "usable_cores", lambda: 4)
    monkeypatch.setattr(commands, "usable_memory", lambda: None)
    monkeypatch.setattr(commands, "visible_gpus", lambda: [])
    monkeypatch.setattr("domainbed_sfp.sweep.capacity.usable_cores", lambda: 4)
    sweep = (
        "sweep",
        "launch",
        "--datasets",
        "ColoredDigits",
        "--algorithms",
        "ERM",
        "--n_hparams",
        1,
        "--n_trials",
        1,
        "--output_dir",
    )
    told = main(*sweep, "out").stdout
    assert "--jobs auto: 4 at a time, each with 1 thread (4 cores)." in told
    assert "auto" not in main(*sweep, "other", "--jobs", 2).stdout and started == [4, 2]
    for bad, part in (("0", "--jobs"), ("some", "expected auto or a number, got 'some'")):
        done = main(*sweep, "bad", "--jobs", bad, check=False)
        assert done.returncode == 2 and part in done.stderr
    assert_one_line_error(main(*sweep, "bad", "--jobs", 0, check=False), "--jobs", "0")


class _Done:
    interrupted, failures = False, ()
