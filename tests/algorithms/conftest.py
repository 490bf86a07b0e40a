"""Directions without their test for chance."""

from __future__ import annotations

import pytest

from domainbed_sfp.pruning import directions as spurious


@pytest.fixture
def any_direction(monkeypatch):
    """Directions are taken from noise, too."""
    monkeypatch.setattr(spurious, "CHANCE_FACTOR", 0.0)
