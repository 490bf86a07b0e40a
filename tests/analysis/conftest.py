"""Sweeps of compared rows."""

from __future__ import annotations

import pytest
from compared_rows import write_row


@pytest.fixture
def three_datasets(tmp_path):
    """ERM, SFP and Taylor on three data sets, where SFP always wins and Taylor always loses."""
    directory = tmp_path / "three"
    for at, dataset in enumerate(["Tiny", "Small", "Large"]):
        for algorithm, value, sparsity in (("ERM", 0.6, 0.0), ("SFP", 0.7, 0.5), ("Taylor", 0.4, 0.5)):
            values = [value + 0.01 * at, value + 0.02 * at]
            write_row(directory, algorithm, {0: values, 1: values}, dataset=dataset, sparsity=sparsity)
    return directory
