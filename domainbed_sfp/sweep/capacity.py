"""What a machine has for the jobs of a sweep, and how many of them it runs at the same time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from domainbed_sfp.core import surroundings
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.sweep.job import Job
from domainbed_sfp.training import hparams

CGROUP = Path("/sys/fs/cgroup")

# Memory of a run: the program, and what a step and an evaluation hold for each pixel of a step's images.
# EfficientNet-Lite0 with 48 images of 128 px takes 4 GiB; ResNet-50 with 96 of 224 px takes less than this says.
JOB_BYTES, BYTES_A_PIXEL = 2**30, 4 * 2**10
# Of the machine's memory, what jobs may take.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Slots:
    """How many jobs run at the same time, and why, in a few words."""

    jobs: int
    why: str


def choose_slots(jobs: Sequence[Job], cores: int, memory: int | None, gpus: Sequence[str]) -> Slots:
    """What `--jobs auto` stands for: processes before threads.

    A job for each GPU; without one, a job for each core and with one thread, as far as `memory` (bytes, None where it
    is not known) holds them. Two processes of one thread train more images a second than one of two threads, the more
    so the smaller the network (benchmarks/jobs.py). Where the user has set OMP_NUM_THREADS, each job has as many. The
    choice depends on machine and sweep alone, not on what is left to do: a job that is continued must find as many
    threads as it was begun with.
    """
    if gpus:
        return Slots(len(gpus), f"one for each of {len(gpus)} GPUs" if len(gpus) > 1 else "one for the GPU")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    each = int(threads) if threads.isdigit() and int(threads) else 1
    limits = {f"{cores} cores": max(1, cores // each), f"{len(jobs)} jobs in all": max(1, len(jobs))}
    if memory is not None and jobs:
        rows = {(job.dataset, job.algorithm, len(job.test_envs), job.hparams): job for job in jobs}
        need = max(bytes_of(job) for job in rows.values())
        words = f"{memory / 2**30:.0f} GiB of memory, of which each may take {need / 2**30:.1f}"
        limits[words] = max(1, int(MEMORY_SHARE * memory / need))
    why, chosen = min(limits.items(), key=lambda limit: limit[1])
    return Slots(chosen, why + (f", OMP_NUM_THREADS={each}" if threads else ""))


def bytes_of(job: Job) -> int:
    """Memory that a job may take, with the default of what is drawn."""
    cls = get_dataset_class(job.dataset)
    values = hparams.resolve_hparams(job.algorithm, job.dataset, overrides=job.overrides)
    environments = len(cls.ENVIRONMENTS or ()) or 4
    pixels = values["batch_size"] * max(1, environments - len(job.test_envs)) * values["image_size"] ** 2
    return JOB_BYTES + BYTES_A_PIXEL * pixels


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by the CPU time its control group grants it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _cpu_quota()
    return max(1, min(cores, int(quota / period))) if quota > 0 else cores


def usable_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its control group's limit; None where unknown."""
    found = [limit for name in ("memory.max", "memory/memory.limit_in_bytes") if (limit := _number(CGROUP / name))]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one per GPU that this process may use.

    CUDA uses the devices of that list up to the first that is not there (-1, an empty name, a number too high), and
    none where one is named twice: torch says how many that leaves.
    """
    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in listed.split(",")][:count]


def _cpu_quota() -> tuple[int, int]:
    """(microseconds of CPU time, in so many of wall time); a quota of 0 where there is none."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return (0 if quota == "max" else int(quota)), int(period)
    except (OSError, ValueError):  # version 1 has two files, other systems none
        return _number(CGROUP / "cpu/cpu.cfs_quota_us"), _number(CGROUP / "cpu/cpu.cfs_period_us") or 1


def _number(file: Path) -> int:
    """The number that a file holds; 0 where it holds none."""
    try:
        return max(0, int(file.read_text()))
    except (OSError, ValueError):
        return 0


def job_environment(slot: int, slots: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment of the job in `slot`: its share of the threads, unless the user has set a number, and its GPU."""
    environment = surroundings.with_threads(os.environ, max(1, usable_cores() // slots))
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment
