"""Changes of a bundle, and the problems that are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle import layout
from domainbed_sfp.leaderboard.bundle.tree import sums_text

DATASET, ROW = "FullColoredDigits", "Magnitude (sparsity=0.5)"


def resum(folder: Path) -> None:
    """Makes SHA256SUMS anew, as a forger would."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != layout.SUMS]
    sums = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / layout.SUMS).write_text(sums_text(sums))


def runs(folder: Path) -> list[Path]:
    """Files of records, by (trial seed, hparams seed)."""

    def seeds(file: Path) -> tuple[int, int]:
        args = json.loads(file.read_text().splitlines()[0])["args"]
        return args["trial_seed"], args["hparams_seed"]

    return sorted((folder / "records").iterdir(), key=seeds)


def edit(file: Path, change, lines: slice = slice(None)) -> None:
    """Changes records of a file by `change(record)`."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records[lines]:
        change(record)
    file.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def edit_submission(folder: Path, change) -> None:
    document = json.loads((folder / "submission.json").read_text())
    change(document)
    (folder / "submission.json").write_text(json.dumps(document))


def problems(folder: Path) -> list[str]:
    outcome = validation.validate(folder)
    assert outcome.problems and outcome.tier is None
    return [problem.line() for problem in outcome.problems]


def assert_told(folder: Path, file: str, field: str, expected: str, found: str) -> list[str]:
    """Some problem names file, field, what was expected and what was found."""
    told = problems(folder)
    start = f"{file}: {field}" if field else file
    matching = [line for line in told if line.startswith(f"{start}: expected ")]
    assert any(expected in line.split(", found ")[0] and found in line.split(", found ")[-1] for line in matching), told
    return told


def name_of(file: Path) -> str:
    return f"records/{file.name}"
