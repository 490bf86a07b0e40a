"""Shared by all tests: small thread pools, no user cache, seeds, and the places a machine may offer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported anywhere: many small operations gain nothing by threads, and two busy cores suffer by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


# Reasons for which a test may skip, as a regular expression: .ci/run sets it, and any other skip is a failure there.
ALLOWED_SKIPS = os.environ.get("DOMAINBED_SFP_ALLOWED_SKIPS")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, since some tests wait for a cluster, a server or a process; no more than eight,
    since each makes its own fixtures."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 1, 8)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _without_other_skips((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _without_other_skips((yield))


def _without_other_skips(report):
    if ALLOWED_SKIPS is not None and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        if not re.search(ALLOWED_SKIPS, reason):
            report.outcome = "failed"
            report.longrepr = f"{reason}: a skip that DOMAINBED_SFP_ALLOWED_SKIPS does not allow"
    return report


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMAINBED_SFP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def golden():
    """Reads a golden file: values computed by DomainBed at commit b93c22a1cfc3."""

    def read(name: str):
        return json.loads((GOLDEN / name).read_text())

    return read


@pytest.fixture(scope="session")
def pacs_dir() -> Path:
    """A folder that holds real PACS in DomainBed's layout."""
    given = os.environ.get("DOMAINBED_SFP_TEST_DATA")
    root = Path(given) if given else SHARED_DATA
    if not (root / "PACS").is_dir():
        pytest.skip("real PACS is not here: set DOMAINBED_SFP_TEST_DATA to a folder that holds PACS/")
    return root


@pytest.fixture(scope="session")
def domainbed_root() -> Path:
    """An unmodified DomainBed checkout."""
    given = os.environ.get("DOMAINBED_ROOT")
    if not given:
        pytest.skip("no DomainBed checkout: set DOMAINBED_ROOT")
    return Path(given).resolve()


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The same command in this process, for the many cases that need no process of their own."""
    from domainbed_sfp.cli import main as cli

    def run(*args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, args)))
        printed = capsys.readouterr()
        done = subprocess.CompletedProcess(args, ended.value.code, printed.out, printed.err)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def cli(tmp_path: Path):
    """Runs `domainbed-sfp ARGS` as a user does, in a folder of its own."""

    def run(*args: object, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "domainbed_sfp", *map(str, args)],
            capture_output=True, text=True, cwd=options.pop("cwd", tmp_path), timeout=240, **options,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run
