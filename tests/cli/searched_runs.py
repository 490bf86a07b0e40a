"""Sweeps on disk, and what the command prints of them."""

from __future__ import annotations

from pathlib import Path

from runs_on_disk import record, write_run

ROOT = Path(__file__).parents[2]


GOLDEN = ROOT / "tests" / "golden"


def accuracies(row: dict) -> list[float | None]:
    return [None if cell["accuracy"] is None else round(cell["accuracy"], 6) for cell in row["cells"]]


# --- the numbers of the good formats
def three_trials(directory: Path, **fields) -> None:
    """Test accuracies 50, 60, 70 on environment 0 and 20, 20, 50 on environment 1."""
    for trial, (first, second) in enumerate([(0.5, 0.2), (0.6, 0.2), (0.7, 0.5)]):
        write_run(directory, f"a{trial}", [record((first, 0, 0, 0.5), trial_seed=trial, **fields)])
        one = record((0, 0.5, second, 0), trial_seed=trial, test_envs=(1,), **fields)
        write_run(directory, f"b{trial}", [one])
