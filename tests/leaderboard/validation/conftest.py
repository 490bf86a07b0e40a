"""A real sweep and the bundle of one of its rows."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
from changed_bundles import DATASET, ROW

from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.sweep.directory import SweepDirectory
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs
from domainbed_sfp.training import train as training


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """A real sweep: two rows, one test environment, two hparams draws x two trials of five steps."""
    root = tmp_path_factory.mktemp("sweep")
    spec = SweepSpec(
        [DATASET], [{"name": "Magnitude", "hparams": {"sparsity": s}} for s in (0.5, 0.3)], n_hparams=2, n_trials=2,
        steps=5, checkpoint_freq=2, test_envs=[[0]], hparams={"batch_size": 16}, skip_model_save=True,
    )  # fmt: skip
    jobs = make_jobs(spec, None)
    directory = SweepDirectory(root)
    directory.register(jobs)
    for job in jobs:
        with contextlib.redirect_stdout(io.StringIO()):
            training.train(job.settings(None, directory.job_dir(job), skip_model_save=True))
    return root


@pytest.fixture(scope="session")
def made(sweep, tmp_path_factory):
    """The bundle of one row of it."""
    target = tmp_path_factory.mktemp("made") / "bundle"
    assert submit(str(sweep), ROW, str(target)).tier == "records-verified"
    return target


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "bundle"))
