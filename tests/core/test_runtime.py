"""What a training process keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Ten training steps of a small network whose activations are 16 MiB each; prints the page faults of the last five.
PROGRAM = """
import resource
import torch
from domainbed_sfp.core import runtime

print(runtime.keep_freed_memory())
network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
x = torch.zeros(4, 3, 256, 256)
for step in range(10):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(x).square().mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_later_steps_touch_few_new_pages():
    # Five steps touch 366,000 pages of 4 KiB where memory is given back, a few thousand where it is kept.
    kept, faults = run()
    assert kept == "True" and int(faults) < 40_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_environment_decides_where_it_says_something():
    # Huge pages, where torch is told to use them, would hide what is counted.
    kept, faults = run(MALLOC_MMAP_THRESHOLD_="131072", THP_MEM_ALLOC_ENABLE="0")
    assert kept == "False" and int(faults) > 100_000
