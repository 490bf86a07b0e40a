"""`collect` and its tables as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs_on_disk import record, write_run

from domainbed_sfp.cli.main import main


@pytest.fixture
def collect(capsys):
    """Runs the command; returns (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["collect", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def table(collect):
    """Runs the command on a directory; returns the JSON table of training-domain selection, checked to be
    alone."""

    def run(directory: Path, *arguments: object) -> dict:
        status, out, err = collect(
            "--input_dir", directory, "--format", "json", "--selection", "training-domain", *arguments
        )
        assert (status, err) == (0, "")
        (only,) = json.loads(out)["tables"]
        return {**only, "report_notes": json.loads(out)["notes"]}

    return run


# --- formats
@pytest.fixture
def compressed(tmp_path):
    """ERM, and a reconstruction with an awkward name at half the size, on two environments with awkward
    names."""
    costs = {"parameters": 11_200_000, "dense_macs": 1_800_000_000, "environments": ["50%", "a_b&c"]}
    for env in (0, 1):
        dense = {"sparsity": 0.0, "surviving_parameters": 11_200_000, "macs": 1_800_000_000}
        write_run(tmp_path, f"erm{env}", [record((0.6,) * 4, test_envs=(env,), **dense, **costs)])
        half = {"sparsity": 0.5, "surviving_parameters": 5_600_000, "macs": 450_000_000}
        ours = record((0.7,) * 4, test_envs=(env,), algorithm="My_<b>", standing="reconstruction", **half, **costs)
        write_run(tmp_path, f"ours{env}", [ours])
    return tmp_path
