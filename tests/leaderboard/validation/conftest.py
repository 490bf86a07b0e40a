"""A real sweep and the bundle of one of its rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from changed_bundles import DATASET, ROW
from computed_sweeps import compute_sweep

from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.sweep.spec import SweepSpec


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """A real sweep: two rows, one test environment, two hparams draws x two trials of five steps."""
    root = tmp_path_factory.mktemp("sweep")
    spec = SweepSpec(
        [DATASET], [{"name": "Magnitude", "hparams": {"sparsity": s}} for s in (0.5, 0.3)], n_hparams=2, n_trials=2,
        steps=5, checkpoint_freq=2, test_envs=[[0]], hparams={"batch_size": 16}, skip_model_save=True,
    )  # fmt: skip
    return compute_sweep(root, spec)


@pytest.fixture(scope="session")
def made(sweep, tmp_path_factory):
    """The bundle of one row of it."""
    target = tmp_path_factory.mktemp("made") / "bundle"
    assert submit(str(sweep), ROW, str(target)).tier == "records-verified"
    return target


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "bundle"))
