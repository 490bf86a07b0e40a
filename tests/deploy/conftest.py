"""A run whose network is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported_networks import _train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short run that pruned half of the channels."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    _train(folder)
    return folder
