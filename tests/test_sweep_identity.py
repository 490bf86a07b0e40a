"""What makes two jobs, runs and rows the same: names frozen by golden files, settings by value and not by spelling."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from domainbed_sfp.sweep.jobs import SweepDirectory
from domainbed_sfp.sweep.spec import make_jobs, read_spec, shipped_specs

RESULTS = Path(__file__).parents[1] / "results"


def _digest(names) -> str:
    return hashlib.md5(" ".join(names).encode()).hexdigest()


def test_jobs_of_the_shipped_specs_keep_their_names_and_folders(golden):
    frozen = golden("job_names.json")["specs"]
    assert set(frozen) <= set(shipped_specs())
    for name, expected in frozen.items():
        jobs = make_jobs(read_spec(name), "/data")
        assert {
            "jobs": len(jobs),
            "names": _digest(job.name for job in jobs),
            "domainbed_names": _digest(job.domainbed_name("/data") for job in jobs),
        } == expected, name


@pytest.mark.parametrize("manifest", sorted(RESULTS.glob("*/sweep.json")), ids=lambda path: path.parent.name)
def test_committed_sweeps_keep_their_folders(manifest):
    directory = SweepDirectory(manifest.parent)
    listed = [entry["name"] for entry in json.loads(manifest.read_text())["jobs"]]
    jobs = directory.listed()
    assert [directory.job_dir(job).name for job in jobs] == listed
    assert [job.name for job in jobs] == listed
