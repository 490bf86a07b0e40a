"""A run of a few steps; reads the records of runs, and writes small ones for the tests of tables, with the accuracies spelled
out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUN = ("train", "--dataset", "FullColoredDigits", "--algorithm", "Magnitude", "--test_envs", 2, "--checkpoint_freq", 10)

# Two environments: [env0 in, env0 out, env1 in, env1 out], as fractions.
Accuracies = tuple[float, float, float, float]


def record(
    accuracies: tuple[float, ...],
    *,
    step: int = 0,
    test_envs: tuple[int, ...] = (0,),
    algorithm: str = "ERM",
    dataset: str = "Tiny",
    hparams_seed: int = 0,
    trial_seed: int = 0,
    args: dict[str, Any] | None = None,
    hparams: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A record of DomainBed's fields; `accuracies` alternate in and out split, environment by environment."""
    made: dict[str, Any] = {
        "step": step,
        "epoch": step / 10,
        "step_time": 0.5,
        "args": {
            "algorithm": algorithm,
            "dataset": dataset,
            "test_envs": list(test_envs),
            "hparams_seed": hparams_seed,
            "trial_seed": trial_seed,
            "holdout_fraction": 0.2,
            "hparams": None,
            "steps": 301,
            "task": "domain_generalization",
            "output_dir": "out",
            **(args or {}),
        },
        "hparams": {"resnet18": True, "resnet50_augmix": False, "freeze_bn": False, **(hparams or {})},
        **fields,
    }
    for env in range(len(accuracies) // 2):
        made[f"env{env}_in_acc"], made[f"env{env}_out_acc"] = accuracies[2 * env : 2 * env + 2]
    return made


def write_run(root: Path, name: str, records: list[dict[str, Any]], *, done: bool = True) -> Path:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, sort_keys=True) + "\n" for one in records]
    (directory / "results.jsonl").write_text("".join(lines))
    if done:
        (directory / "done").write_text("done")
    return directory


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
