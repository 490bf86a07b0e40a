"""Entries as sweeps would give them, made from a formula: nothing here was measured."""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import replace
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

from domainbed_sfp.algorithms import registry
from domainbed_sfp.leaderboard.documents.entry import Entry, EntryCell, Result, Trial
from domainbed_sfp.leaderboard.facts import facts_of, split_sizes
from domainbed_sfp.leaderboard.rerun.drawing import draw
from domainbed_sfp.leaderboard.tracks import reasons_for_open

ENVIRONMENTS = {
    "PACS": ("art_painting", "cartoon", "photo", "sketch"),
    "OfficeHome": ("Art", "Clipart", "Product", "Real World"),
    "TerraIncognita": ("location_100", "location_38", "location_43", "location_46"),
}
# algorithm, sparsity, standing, transductive, bitops as a part of single precision
METHODS: tuple[tuple[str, float, str, bool, float | None], ...] = (
    ("ERM", 0.0, "reference", False, None),
    ("IRM", 0.0, "reference", False, None),
    ("VREx", 0.0, "reference", False, None),
    ("GroupDRO", 0.0, "reference", False, None),
    ("CORAL", 0.0, "reference", False, None),
    ("Mixup", 0.0, "reference", False, None),
    *((name, sparsity, standing, False, None)
      for name, standing in (("Magnitude", "published"), ("Taylor", "published"), ("SFP", "reconstruction"))
      for sparsity in (0.3, 0.5, 0.7, 0.95)),
    ("NetworkSlimming", 0.5, "published", False, None),
    ("RigL", 0.9, "published", False, None),
    ("SNIP", 0.5, "published", False, None),
    ("MRM", 0.5, "published", False, None),
    ("SparseIRM", 0.5, "published", False, None),
    ("Quantized", 0.0, "published", False, 1 / 64),
    ("Adapted", 0.5, "published", True, None),
    ("Adapted2", 0.7, "published", True, None),
)  # fmt: skip


def result(
    seed: str, dataset: str, sparsity: float, bitops: float | None, environments: tuple[str, ...], tested: int
) -> Result:
    """Three trials an environment; the last environments are not tested where `tested` is less than all."""
    draw = random.Random(seed)
    level = draw.uniform(60, 70) - 12 * sparsity**3
    cells: list[EntryCell | None] = []
    for index, environment in enumerate(environments):
        size = facts_of(dataset).sizes[index]
        samples = split_sizes(size, True, 0.2, 0.0)["in"] if size else 10_000
        trials = tuple(
            Trial(
                trial,
                100 * round((level + 5 * index + draw.uniform(-2, 2)) * samples / 100) / samples,
                draw.uniform(80, 95),
                draw.randrange(10) + 10 * seed.endswith("oracle"),
                300 * (1 + trial),
                f"{draw.getrandbits(128):032x}",
            )
            for trial in range(3)
        )
        values = [trial.accuracy for trial in trials]
        cells.append(EntryCell(environment, mean(values), stdev(values) / 3**0.5, trials) if index < tested else None)
    found = [cell for cell in cells if cell]
    whole = len(found) == len(cells)
    averages = [mean(trials) for trials in zip(*([trial.accuracy for trial in cell.trials] for cell in found))]
    low = min(found, key=lambda cell: cell.accuracy)
    macs, parameters = 4_100_000_000, 23_500_000
    jitter = draw.uniform(0.95, 1.05)
    costs: dict[str, float] = {
        "sparsity": sparsity,
        "parameters": float(parameters),
        "surviving_parameters": round(parameters * (1 - sparsity * jitter * 0.98) ** 1.5),
        "dense_macs": float(macs),
        "macs": round(macs * (1 - sparsity * jitter * 0.98) ** 1.4),
    }
    if bitops:
        costs["bitops"] = 1024.0 * macs * bitops
    return Result(
        tuple(cells),
        (mean(cell.accuracy for cell in found), stdev(averages) / 3**0.5) if whole else None,
        (low.environment, low.accuracy) if whole else None,
        costs,
    )


def entry(
    dataset: str,
    method: tuple[str, float, str, bool, float | None],
    track: str = "closed",
    tested: int = 4,
    **changes: Any,
) -> Entry:
    """An entry under two selection rules."""
    algorithm, sparsity, standing, transductive, bitops = method
    environments = ENVIRONMENTS[dataset]
    open_ = track == "open"
    info = registry.get(algorithm) if algorithm in registry.names() else None
    settings: dict[str, Any] = {"sparsity": sparsity} if sparsity else {}
    if open_:
        settings |= {"backbone": ("efficientnet_lite0", "mobilenetv3")[len(algorithm) % 2], "image_size": 64}
    told = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "image_size")
    name = f"{algorithm} ({told})" if told else algorithm
    seed = f"{dataset}{name}"
    made = Entry(
        name=name, dataset=dataset, algorithm=algorithm, settings=settings,
        tier=("self-reported", "records-verified", "rerun-verified")[len(name) % 3], track=track, transductive=transductive,
        standing=info.standing if info else standing,
        reference=info.reference if info else "Somebody et al. 2021, arXiv 2101.00001",
        protocol={
            "environments": list(environments), "test_envs": [[index] for index in range(tested)],
            "steps": 3000 if open_ else 5001, "checkpoint_freq": 300,
            "backbone": settings["backbone"] if open_ else "resnet50 (augmix)",
            "weights": "imagenet", "image_size": 64 if open_ else 224, "holdout_fraction": 0.2, "precision": "fp32",
            "task": "domain_generalization", "hparams_seeds": list(range(20)), "trial_seeds": [0, 1, 2], "data_digest": None,
        },
        results={
            rule: result(seed + rule, dataset, sparsity, bitops, environments, tested)
            for rule in ("training-domain", "oracle")
        },
        unverified=("bitops",) if bitops else (), step_0=None, models=None,
        rerun=None, runs=(hashlib.sha256(seed.encode()).hexdigest(),),
        bundle=f"{random.Random(seed).getrandbits(256):064x}", date="2026-03-14",
        package="domainbed_sfp 0.1.0", commit="0123456789ab",
    )  # fmt: skip
    return replace(as_added(made), **changes)


def as_added(made: Entry) -> Entry:
    """The entry with the notes and the rerun that its track and tier ask for."""
    protocol, notes = made.protocol, []
    if made.track == "open":
        values = SimpleNamespace(hparams=made.settings, args={}, evaluate="all")
        notes += [f"Open track: {reason}." for reason in reasons_for_open(made.dataset, protocol, [values])]
    if made.tier == "self-reported":
        notes.append("Not checked: its masks.")
    made = replace(made, notes=tuple(notes))
    if made.tier == "rerun-verified":
        cited: dict[str, set[str]] = {}
        for one in made.results.values():
            for cell in filter(None, one.cells):
                cited.setdefault(cell.environment, set()).update(trial.run for trial in cell.trials)
        cells = [
            {"run": run, "agreement": "within tolerance", "difference": 1.5, "selected_difference": 0.5}
            for run in draw(cited, 1, made.bundle, 7)
        ]
        again = {"seed": 7, "per_environment": 1, "tolerance": 3.0, "mean_difference": 0.25, "cells": cells}
        made = replace(made, rerun=again)
    return made


@functools.cache
def many() -> list[Entry]:
    """25 methods on three data sets; the open track on one; one entry that replaced another."""
    found = [entry(dataset, method) for dataset in ENVIRONMENTS for method in METHODS]
    found += [entry("PACS", method, track="open") for method in METHODS[6:12]]
    found.append(entry("PACS", METHODS[0], track="open", tested=2))
    current = found[0]
    old = replace(
        current, date="2025-11-02", tier="self-reported", rerun=None, bundle="ab" * 32, superseded_by=current.bundle,
        notes=("Not checked: its masks.",),
    )  # fmt: skip
    return [*found, old]
