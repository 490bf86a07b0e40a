"""The page of made entries, and of hostile ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from built_pages import hostile_entry, write
from synthetic_entries import many

from domainbed_sfp.leaderboard.site import build
from domainbed_sfp.leaderboard.site.board import board_of


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """All formats of many entries."""
    root = tmp_path_factory.mktemp("leaderboard")
    build.build(write(root / "entries", many()), root / "out", list(build.FILES))
    return root / "out"


@pytest.fixture(scope="session")
def hostile_board():
    first = hostile_entry(0)
    return board_of([first, hostile_entry(1), replace(first, superseded_by="<b>superseded")])
