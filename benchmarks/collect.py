"""Time and memory of collecting a sweep of 6,000 runs with 18 records each, in DomainBed's format.

    python benchmarks/collect.py [--runs 6000] [--records 18] [--write]

Ends with status 1 where time or memory is more than twice the committed figures (figures.py); --write commits these.
With DOMAINBED_ROOT set to a DomainBed checkout (whose requirements this Python has), its collect_results
reads the same sweep, the two outputs are compared and the ratios are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures

ROOT = Path(__file__).resolve().parent.parent

# Runs a command and prints, as the last line of stderr, its wall time and CPU time in seconds and its peak memory in
# kilobytes.
MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:]).returncode
wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(f"\\n{wall} {used.ru_utime + used.ru_stime} {used.ru_maxrss}", file=sys.stderr)
sys.exit(status)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=6000)
    parser.add_argument("--records", type=int, default=18)
    parser.add_argument("--write", action="store_true", help="make these the committed figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        sweep = Path(directory) / "sweep"
        write_sweep(sweep, arguments.runs, arguments.records)
        ours = [sys.executable, "-m", "domainbed_sfp", "collect", "--input_dir", str(sweep)]
        print(f"{arguments.runs} runs x {arguments.records} records")
        compatible = measure("ours, --format domainbed", [*ours, "--format", "domainbed"], ROOT)
        tables = measure("ours, --format markdown", [*ours, "--format", "markdown"], ROOT)
        measured = {"--format domainbed": compatible.cost, "--format markdown": tables.cost}
        settings = f"{arguments.runs} runs x {arguments.records} records"
        doubled = figures.check("collect", measured, settings, arguments.write)
        print("\n".join(doubled) or "nothing has doubled")
        domainbed = os.environ.get("DOMAINBED_ROOT")
        if not domainbed:
            print("DOMAINBED_ROOT is not set: nothing to compare with")
            return 1 if doubled else 0
        theirs = [sys.executable, "-m", "domainbed.scripts.collect_results", "--input_dir", str(sweep)]
        upstream = measure("DomainBed's collect_results", theirs, Path(domainbed))
        time_ratio, memory_ratio = compatible.wall / upstream.wall, compatible.megabytes / upstream.megabytes
        print(f"ratio: {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory")
        same = compatible.printed == upstream.printed
        print("same output" if same else "DIFFERENT output")
        return 0 if same and not doubled else 1


@dataclass(frozen=True)
class Measured:
    """What a command took: seconds of wall and CPU time, megabytes at the peak; and what it printed."""

    wall: float
    cpu: float
    megabytes: float
    printed: bytes

    @property
    def cost(self) -> tuple[float, float]:
        """(seconds of CPU time, megabytes)."""
        return self.cpu, self.megabytes


def measure(name: str, command: list[str], directory: Path) -> Measured:
    """A command run in `directory`."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], cwd=directory, capture_output=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr.decode()}")
    wall, cpu, kilobytes = map(float, done.stderr.split(b"\n")[-2].split())
    print(f"{name}: {wall:.2f} s ({cpu:.2f} s of CPU time), {kilobytes / 1024:.0f} MB")
    return Measured(wall, cpu, kilobytes / 1024, done.stdout)


def write_sweep(directory: Path, runs: int, records: int) -> None:
    """A sweep as DomainBed's scripts lay it out: single and pair test environments of PACS and VLCS, 20
    hparams seeds, 3 trials, as many algorithms as it takes; accuracies by formula."""
    algorithms = ["ERM", "IRM", "GroupDRO", "Mixup", "CORAL"]
    algorithms += [f"Method{i}" for i in range(runs // 1200)]
    sets = [[i] for i in range(4)] + [[i, j] for i in range(4) for j in range(i + 1, 4)]
    jobs = itertools.product(algorithms, ("VLCS", "PACS"), range(3), sets, range(20))
    started = time.perf_counter()
    for algorithm, dataset, trial_seed, test_envs, hparams_seed in itertools.islice(jobs, runs):
        args = {
            "algorithm": algorithm,
            "checkpoint_freq": None,
            "data_dir": "/data",
            "dataset": dataset,
            "holdout_fraction": 0.2,
            "hparams": None,
            "hparams_seed": hparams_seed,
            "output_dir": "",
            "save_model_every_checkpoint": False,
            "seed": 0,
            "skip_model_save": True,
            "steps": None,
            "task": "domain_generalization",
            "test_envs": test_envs,
            "trial_seed": trial_seed,
            "uda_holdout_fraction": 0,
        }
        name = hashlib.md5(json.dumps(args, sort_keys=True).encode()).hexdigest()
        args["output_dir"] = f"/sweep/{name}"
        write_run(directory / name, args, records)
    print(f"wrote the sweep in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def write_run(run: Path, args: dict[str, Any], records: int, environments: int = 4, done: bool = True) -> None:
    """A run's folder: records of DomainBed's fields, with accuracies that follow from the folder's name."""
    hparams = {
        "batch_size": 32,
        "class_balanced": False,
        "data_augmentation": True,
        "freeze_bn": False,
        "lr": 5e-05,
        "nonlinear_classifier": False,
        "resnet18": False,
        "resnet50_augmix": True,
        "resnet_dropout": 0.0,
        "weight_decay": 0.0,
    }
    draws = int(run.name, 16)
    lines = []
    for number in range(records):
        step = 300 * number
        record: dict[str, Any] = {
            "step": step,
            "epoch": step / 44,
            "step_time": 0.25,
            "loss": 1 / (1 + number),
            "mem_gb": 0.0,
        }
        for env in range(environments):
            for split in ("in", "out"):
                draws = (draws * 6364136223846793005 + 1442695040888963407) % 2**64
                record[f"env{env}_{split}_acc"] = (draws >> 40) / 2**24
        lines.append(json.dumps({**record, "args": args, "hparams": hparams}, sort_keys=True))
    run.mkdir(parents=True)
    (run / "results.jsonl").write_text("\n".join(lines) + "\n")
    if done:
        (run / "done").write_text("done")


if __name__ == "__main__":
    sys.exit(main())
