"""A sweep with every model kept, its bundle and records."""

from __future__ import annotations

import pytest
from computed_sweeps import compute_sweep
from recomputed_bundles import DATASET

from domainbed_sfp.leaderboard.submit import submit
from domainbed_sfp.sweep.spec import SweepSpec


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Two test environments of one trial, three steps, with every model kept."""
    root = tmp_path_factory.mktemp("rerun") / "sweep"
    spec = SweepSpec(
        [DATASET], ["Magnitude"], n_hparams=1, n_trials=1, steps=3, checkpoint_freq=1, test_envs=[[0], [2]],
        hparams={"batch_size": 8},
    )  # fmt: skip
    return compute_sweep(root, spec, skip_model_save=False, save_model_every_checkpoint=True)


@pytest.fixture(scope="session")
def made(sweep):
    """Its bundle, with models."""
    target = sweep.parent / "bundle"
    submit(str(sweep), "Magnitude", str(target), with_models=True)
    return target
