"""What a sweep's runs cost beside their steps, and whether `--jobs auto` is right to take processes before threads.

    python benchmarks/jobs.py [--runs 4] [--steps 100] [--data_dir DIR] [--json FILE]

Launches the same runs on the embedded digits, and with `--data_dir` on PACS (EfficientNet-Lite0, 64 px), one at a time
with all threads (`--jobs 1`), and as many at a time as there are cores with one thread each, as `--jobs auto` does. The
fixed cost of a run (its start, data, first evaluation, checkpoint and end) is what a run of one step takes, beyond the
launch's own start. Ends with status 1 where that is more than 1.5 s, or where `auto` is slower than one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from collect import ROOT

from domainbed_sfp.core import provenance
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.sweep.capacity import usable_cores

FIXED_COST = 1.5
SMALL = {"RotatedDigits": {}, "FullColoredDigits": {}}
PHOTOGRAPHS = {"PACS": {"backbone": "efficientnet_lite0", "weights": "none", "image_size": 64, "batch_size": 16}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4, help="of each data set, at least 2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data_dir", help="folder that holds PACS/")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    settings = {"runs": args.runs, "steps": args.steps}
    report: dict[str, object] = {"environment": provenance.fingerprint(torch.device("cpu")), "settings": settings}
    failed = []
    for dataset in [*SMALL, *(PHOTOGRAPHS if args.data_dir else ())]:
        figures = {}
        if dataset in SMALL:
            first = launch(dataset, 1, 1, "1")
            fixed = (launch(dataset, args.runs, 1, "1") - first) / (args.runs - 1)
            print(f"{dataset}: a launch with its first run {first:.2f} s, each further run {fixed:.2f} s", flush=True)
            figures = {"first_run_s": first, "fixed_cost_s": fixed}
            if fixed > FIXED_COST:
                failed.append(f"{dataset}: the fixed cost of a run is {fixed:.2f} s, promised are {FIXED_COST} s")
        one, auto = (launch(dataset, args.runs, args.steps, jobs, args.data_dir) for jobs in ("1", "auto"))
        print(f"{dataset}: {args.runs} runs of {args.steps} steps: --jobs 1 {one:.1f} s, --jobs auto {auto:.1f} s")
        report[dataset] = {**figures, "jobs_1_s": one, "jobs_auto_s": auto}
        if usable_cores() > 1 and auto > one:
            failed.append(f"{dataset}: --jobs auto is slower than --jobs 1")
    print("\n".join(failed) or "kept")
    if args.json:
        write_atomically(args.json, json.dumps(report, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


def launch(dataset: str, runs: int, steps: int, jobs: str, data_dir: str | None = None) -> float:
    """Seconds of a launch of so many trials of ERM."""
    spec = {
        "datasets": [dataset], "algorithms": ["ERM"], "test_envs": [[0]], "n_hparams": 1, "n_trials": runs,
        "steps": steps, "checkpoint_freq": steps, "skip_model_save": True,
        "hparams": {**SMALL, **PHOTOGRAPHS}[dataset],
    }  # fmt: skip
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spec.yaml"
        file.write_text(yaml.safe_dump(spec))
        command = [sys.executable, "-m", "domainbed_sfp", "sweep", "launch", str(file), "--jobs", jobs]
        command += ["--output_dir", str(Path(folder) / "out"), *(("--data_dir", data_dir) if data_dir else ())]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables, cwd=ROOT)
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
