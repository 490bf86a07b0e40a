"""Some runs of a bundle computed anew, and compared with what it says of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from domainbed_sfp import environment, records, training
from domainbed_sfp.errors import UserError
from domainbed_sfp.leaderboard.bundle import RECORDS, WEIGHTS
from domainbed_sfp.leaderboard.schema import Problem, shown
from domainbed_sfp.leaderboard.summary import SubmittedRun

# What two computations of a run share on any machine. hparams: a run on other ones is another run; data_digest: so is
# one on other images.
SAME = ("data_digest", "dense_macs", "environments", "hparams", "input_shape", "parameters", "standing")

# Points of accuracy by which a run on another machine may differ, in any split of its last record. Sums in another
# order part two trainings after some steps; what remains alike is what they learn, up to the noise of a few samples.
TOLERANCE = 3.0


@dataclass(frozen=True)
class Recomputed:
    """A run computed anew. difference: the largest of an accuracy, in points; over all records where machine and code
    are the same, else over the last one."""

    run: str
    agreement: str
    difference: float


@dataclass
class Rerun:
    """What was computed anew: the choice's seed, points that accuracies may differ by, the runs, and which agreed."""

    seed: int
    tolerance: float
    runs: list[str] = field(default_factory=list)
    agreed: list[Recomputed] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """In a word: "not computed" where the records themselves are wrong."""
        if not self.runs:
            return "not computed"
        return "agreed" if len(self.agreed) == len(self.runs) else "disagreed"

    def document(self, names: Collection[str]) -> dict[str, Any] | None:
        """The `rerun` of an entry whose runs have these names; None where not one of them was computed anew, or one of
        all disagreed."""
        cells = [asdict(one) for one in self.agreed if one.run in names]
        return (
            {"seed": self.seed, "tolerance": self.tolerance, "cells": cells}
            if self.outcome == "agreed" and cells
            else None
        )


def choose(runs: Sequence[SubmittedRun], count: int, seed: int) -> list[SubmittedRun]:
    """`count` runs at random, by `seed` alone."""
    if not 1 <= count <= len(runs):
        raise UserError(f"--rerun: expected a number of runs from 1 to {len(runs)}, which the bundle has, got {count}")
    for run in runs:
        weights = run.run.hparams.get("weights", "imagenet")
        if weights not in WEIGHTS:
            raise UserError(
                f"--rerun: {RECORDS}/{run.name}.jsonl begins from a file of its author (hparam weights "
                f"{shown(weights)}); no file that a bundle names is opened, expected imagenet or none"
            )
    ordered = sorted(runs, key=lambda run: run.name)
    return random.Random(seed).sample(ordered, count)


def recompute(
    run: SubmittedRun, data_dir: str | None, cache_dir: str | None, tolerance: float
) -> tuple[Recomputed | None, list[Problem]]:
    """Trains a run again and compares: bit by bit where machine, versions and commit are those of the records; else
    what must be the same anywhere and, within `tolerance` points, the accuracies of the last record and the highest of
    every split, which no record may exceed. None and the problems where they disagree."""
    args = {name: value for name, value in run.run.args.items() if name in training.TrainArgs.__dataclass_fields__}
    with tempfile.TemporaryDirectory() as folder:
        args.update(data_dir=data_dir, output_dir=folder, cache_dir=cache_dir, device="auto")
        args.update(skip_model_save=True, save_model_every_checkpoint=False)
        with _threads(run.records[0]["environment"].get("threads")), contextlib.redirect_stdout(io.StringIO()):
            training.train(training.TrainArgs(**args))
        lines = (Path(folder) / records.RESULTS).read_text(encoding="utf-8").splitlines()
        again = [json.loads(line) for line in lines]
    return compare(run, again, tolerance)


@contextlib.contextmanager
def _threads(count: Any) -> Iterator[None]:
    """As many threads as the records were made with, where the machine has them: sums depend on their number."""
    usual = torch.get_num_threads()
    if type(count) is int and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def compare(
    run: SubmittedRun, again: Sequence[Mapping[str, Any]], tolerance: float
) -> tuple[Recomputed | None, list[Problem]]:
    """Two computations of one run; see `recompute`."""
    file = f"{RECORDS}/{run.name}.jsonl"
    first, last = run.records[0], run.records[-1]
    theirs, ours = first.get("code"), again[0].get("code")
    if theirs and ours and theirs != ours:
        words = f"{ours}, the hash of the algorithm's package here: install the version that made the records"
        return None, [Problem(file, "line 1.code", words, shown(theirs))]
    same_place = all(first.get(name) == again[0].get(name) for name in ("environment", "commit", "code"))
    if [record["step"] for record in run.records] != [record["step"] for record in again]:
        steps = shown([record["step"] for record in again])
        return None, [Problem(file, "step", f"{steps}, as computed anew", shown([r["step"] for r in run.records]))]
    if same_place:
        volatile = {*records.VOLATILE_FIELDS, "args"}
        problems = [
            Problem(file, f"line {number}.{name}", f"{shown(new[name])}, as computed anew on the same machine type",
                    shown(old.get(name)))
            for number, (old, new) in enumerate(zip(run.records, again), start=1)
            for name in sorted(new)
            if name not in volatile and old.get(name) != _plain(new[name])
        ]  # fmt: skip
        return (None, problems) if problems else (Recomputed(run.name, "identical", 0.0), [])
    problems = [
        Problem(file, f"line {number}.{name}", f"{shown(new.get(name))}, as computed anew", shown(old.get(name)))
        for number, (old, new) in enumerate(zip(run.records, again), start=1)
        for name in (*SAME, "final_compression")
        if old.get(name) != new.get(name)
    ]
    accuracies = [name for name in sorted(again[-1]) if name.startswith("env") and name.endswith("_acc")]
    elsewhere = f"as computed anew on another machine or commit, within {tolerance:g} points"
    differences = {name: 100 * abs(last.get(name, -1) - again[-1][name]) for name in accuracies}
    problems += [
        Problem(file, f"line {len(again)}.{name}", f"{again[-1][name]!r}, {elsewhere}", shown(last.get(name)))
        for name, difference in differences.items()
        if difference > tolerance
    ]
    # Selection may choose any record, so that a false one in the midst would be as good as a false last one.
    for name in accuracies:
        highest = max(record[name] for record in again)
        number, found = max(enumerate((r.get(name, 0) for r in run.records), start=1), key=lambda pair: pair[1])
        if 100 * (found - highest) > tolerance:
            words = f"at most {highest!r}, the highest of all records {elsewhere}"
            problems.append(Problem(file, f"line {number}.{name}", words, shown(found)))
    if problems:
        return None, problems
    return Recomputed(run.name, "within tolerance", max(differences.values())), []


def here() -> str:
    """The machine that computes anew, in a line."""
    found = environment.fingerprint(training.choose_device("auto"))
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value
