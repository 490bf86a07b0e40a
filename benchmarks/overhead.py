"""What a method's training step costs beside ERM's, on average over a run.

    python benchmarks/overhead.py [--algorithms SFP SFPWeighted Magnitude ...] [--backbone resnet18 efficientnet_lite0]
                                  [--image_size 64] [--batch_size 32] [--steps 300] [--json FILE]

Every method and ERM make a whole run of `--steps` updates on the same synthetic batches of three environments, step by
step in turn, so that a disturbance meets all of them: dense start, masks on the ramp, fine-tuning, statistics and
directions all fall where they do in a real run. Only `update` is timed; data loading is the same for all. Weights are
random, labels are learnable (a brightness per class), so that losses differ between samples as they do in training.
Prints the ratio of the summed times, and that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.core import provenance, runtime
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.core.seeds import seed_everything, seed_hash
from domainbed_sfp.data.loaders import Minibatch
from domainbed_sfp.training import hparams

CLASSES, ENVIRONMENTS = 7, 3

# What we promise for SFP on ResNet-18 and EfficientNet-Lite0.
TARGET = 1.15


def main() -> int:
    args = parse_arguments()
    runtime.prepare_for_training()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for backbone in args.backbone:
        times = measure(backbone, args, device)
        for name in args.algorithms:
            ratio = sum(times[name]) / sum(times["ERM"])
            median = statistics.median(times[name]) / statistics.median(times["ERM"])
            results.append(
                {
                    "backbone": backbone,
                    "algorithm": name,
                    "ratio": round(ratio, 3),
                    "ratio_of_medians": round(median, 3),
                    "erm_step_s": round(sum(times["ERM"]) / len(times["ERM"]), 4),
                    "step_s": round(sum(times[name]) / len(times[name]), 4),
                }
            )
            print(
                f"{backbone:20s} {name:14s} {ratio:5.2f} of ERM's time over a run of {args.steps} steps "
                f"(medians: {median:.2f}; ERM {1e3 * results[-1]['erm_step_s']:.0f} ms a step)",
                flush=True,
            )
    if args.json:
        settings = {name: getattr(args, name) for name in ("image_size", "batch_size", "steps")}
        report: dict[str, Any] = {
            **settings,
            "commit": provenance.commit(),
            "environment": provenance.fingerprint(device),
            "results": results,
        }
        write_atomically(Path(args.json), json.dumps(report, indent=1) + "\n")
    kept = all(row["ratio"] <= TARGET for row in results if row["algorithm"] == "SFP")
    print(f"SFP within {TARGET} of ERM: {'yes' if kept else 'NO'}")
    return 0 if kept else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="training step of pruning methods against ERM's")
    parser.add_argument("--algorithms", nargs="+", default=["SFP", "SFPWeighted", "Magnitude", "Taylor"])
    parser.add_argument("--backbone", nargs="+", default=["resnet18", "efficientnet_lite0"])
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser.parse_args()


def measure(backbone: str, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every update, by algorithm."""
    algorithms = {name: make(name, backbone, args, device) for name in dict.fromkeys(["ERM", *args.algorithms])}
    times: dict[str, list[float]] = {name: [] for name in algorithms}
    for step in range(args.steps):
        batches = minibatches(step, args, device)
        for name, algorithm in algorithms.items():
            seed_everything(seed_hash(0, "step", step))
            synchronize(device)
            begin = time.perf_counter()
            algorithm.update(batches)
            synchronize(device)
            times[name].append(time.perf_counter() - begin)
    return times


def make(name: str, backbone: str, args: argparse.Namespace, device: torch.device) -> Algorithm:
    overrides = {"backbone": backbone, "weights": "none", "image_size": args.image_size}
    values = hparams.resolve_hparams(name, "PACS", overrides=overrides)
    seed_everything(0)
    algorithm: Algorithm = registry.get(name).cls((3, args.image_size, args.image_size), CLASSES, ENVIRONMENTS, values)
    algorithm.total_steps = args.steps
    return algorithm.to(device, memory_format=torch.channels_last).train()


def minibatches(step: int, args: argparse.Namespace, device: torch.device) -> list[Minibatch]:
    batches = []
    for environment_i in range(ENVIRONMENTS):
        generator = torch.Generator().manual_seed(seed_hash("overhead", step, environment_i))
        y = torch.randint(CLASSES, (args.batch_size,), generator=generator)
        x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=generator)
        x += (y - CLASSES / 2)[:, None, None, None] / 4
        batches.append(Minibatch(x.to(device, memory_format=torch.channels_last), y.to(device)))
    return batches


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
