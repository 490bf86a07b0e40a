"""A checkout of DomainBed, made or real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bridge(domainbed_root: Path):
    """Runs a script of the real checkout through the bridge."""

    def run(*args: object, cwd: Path) -> str:
        words = [
            sys.executable,
            "-m",
            "domainbed_sfp",
            "upstream",
            "--domainbed_root",
            domainbed_root,
            "--",
            *args,
        ]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
