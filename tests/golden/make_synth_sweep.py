"""Writes synthetic sweeps in DomainBed's format by formula; `expected/` holds what DomainBed prints for them.

DomainBed's ties and last digits depend on the order of os.listdir: `expected/NAME.sorted.*` are for runs in
the order of their names, `expected/NAME.*` for that order shuffled by random.Random(11).

    python make_synth_sweep.py OUTDIR full|single|edges

full has single and pair test environments, single the --single_test_envs layout. edges is full with holes,
runs cut short or recorded twice, an algorithm under two --hparams, ten environments and a data set DomainBed
does not know.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path


def formula(*key: object) -> int:
    """An integer in 0..999 from a key."""
    return int(hashlib.md5("|".join(map(str, key)).encode()).hexdigest()[:8], 16) % 1000


def write(out: str | Path, variant: str) -> None:
    out = Path(out)
    sets = [[i] for i in range(4)]
    if variant != "single":
        sets += [[i, j] for i in range(4) for j in range(i + 1, 4)]
    for algorithm in ("ERM", "SFP"):
        for dataset in ("VLCS", "PACS"):
            for test_envs in sets:
                write_seeds(out, algorithm, dataset, test_envs)
    if variant == "edges":
        break_edges(out)


def write_seeds(
    out: Path, algorithm: str, dataset: str, test_envs: list[int], envs: int = 4, hparams: str | None = None
) -> None:
    for hparams_seed in range(3):
        for trial_seed in range(3):
            write_run(out, algorithm, dataset, test_envs, hparams_seed, trial_seed, envs, hparams)


def write_run(
    out: Path,
    algorithm: str,
    dataset: str,
    test_envs: list[int],
    hparams_seed: int,
    trial_seed: int,
    envs: int = 4,
    hparams: str | None = None,
) -> Path:
    key = (algorithm, dataset, test_envs, hparams_seed, trial_seed)
    args = {
        "algorithm": algorithm,
        "checkpoint_freq": None,
        "data_dir": "/data",
        "dataset": dataset,
        "holdout_fraction": 0.2,
        "hparams": hparams,
        "hparams_seed": hparams_seed,
        "save_model_every_checkpoint": False,
        "seed": formula("seed", *key),
        "skip_model_save": True,
        "steps": 601,
        "task": "domain_generalization",
        "test_envs": test_envs,
        "trial_seed": trial_seed,
        "uda_holdout_fraction": 0,
    }
    name = hashlib.md5(json.dumps(args, sort_keys=True).encode()).hexdigest()
    args["output_dir"] = "/sweep/" + name
    lines = []
    for step in (0, 300, 600):
        record = {
            "step": step,
            "epoch": step / 32,
            "loss": formula("loss", name, step) / 100,
            "mem_gb": 0.0,
            "step_time": 0.25,
            "args": args,
            "hparams": {"batch_size": 8 + hparams_seed, "lr": (hparams_seed + 1) / 65536, "resnet18": False},
        }
        salt = () if hparams is None else (hparams,)
        for env in range(envs):
            for split in ("in", "out"):
                value = formula(*key, step, env, split, *salt)
                record[f"env{env}_{split}_acc"] = (50 + value * 9 // 10) / 1000
        lines.append(json.dumps(record, sort_keys=True))
    run = out / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "results.jsonl").write_text("\n".join(lines) + "\n")
    (run / "done").write_text("done")
    return run


def break_edges(out: Path) -> None:
    for trial_seed in range(3):
        for hparams_seed in range(3):
            seeds = hparams_seed, trial_seed
            if trial_seed == 1:  # one trial of one cell is gone
                shutil.rmtree(write_run(out, "ERM", "VLCS", [0], *seeds))
            # A whole cell is gone for training-domain and oracle selection; its pair runs stay.
            shutil.rmtree(write_run(out, "SFP", "PACS", [2], *seeds))
            # Pair runs are gone.
            shutil.rmtree(write_run(out, "ERM", "PACS", [1, 3], *seeds))
            cut = write_run(out, "SFP", "VLCS", [1], *seeds)
            (cut / "done").unlink()
            lines = (cut / "results.jsonl").read_text().splitlines(keepends=True)
            (cut / "results.jsonl").write_text("".join(lines[:2]))
    twice = write_run(out, "ERM", "VLCS", [3], 0, 0) / "results.jsonl"
    twice.write_text(twice.read_text() * 2)
    for setting in ('{"irm_lambda": 1}', '{"irm_lambda": 10}'):
        for env in range(4):
            write_seeds(out, "IRM", "PACS", [env], hparams=setting)
    for env in range(10):
        write_seeds(out, "ERM", "SVIRO", [env], envs=10)
    for env in range(2):
        write_seeds(out, "ERM", "MyFolder", [env])


if __name__ == "__main__":
    write(*sys.argv[1:])
