"""Seconds of a training step of DQMQ and of ERM, and their ratio, which should be at most 3 on a CPU.

    python benchmarks/quantization_step.py [--networks lite0 resnet18] [--batch_size 32] [--steps 10] [--json FILE]
                                           [--algorithms DQMQ StaticMixedPrecision UniformQuant]

`lite0` is EfficientNet-Lite0 at 64 px, `resnet18` ResNet-18 at 224 px (--image_size sets another for both), on three
environments of synthetic images, in fp32 and channels_last, as the training loop runs them; weights are random. Steps
take turns, so that all see the same machine. The policy is past its stage at 8 bits and draws a width for each sample;
the table says how many a layer has in use. Prints medians, with minimum and maximum. A step is the update alone,
without reading and augmentation, which are the same for all.
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
from torch import Tensor

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.core import provenance, runtime
from domainbed_sfp.core.seeds import seed_everything
from domainbed_sfp.training import hparams

NETWORKS = {"lite0": ("efficientnet_lite0", 64), "resnet18": ("resnet18", 224)}
CLASSES, DOMAINS = 7, 3
TARGET = 3.0
# A long run of which the benchmark sees some steps behind the stage at 8 bits.
TOTAL_STEPS, FIRST_STEP = 1000, 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--algorithms", nargs="+", default=["DQMQ", "StaticMixedPrecision", "UniformQuant"])
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--batch_size", type=int, default=32, help="images per environment, of which there are 3")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those, not timed")
    parser.add_argument("--json", help="file to write the report to")
    args = parser.parse_args()
    runtime.prepare_for_training()
    fingerprint = provenance.fingerprint(torch.device("cpu"))
    print(f"{fingerprint['cpu']}, {fingerprint['threads']} threads, torch {fingerprint['torch']}")
    report: dict[str, Any] = {"settings": vars(args), "environment": fingerprint, "commit": provenance.commit()}
    for network in args.networks:
        report[network] = measure(network, args)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(network: str, args: argparse.Namespace) -> dict[str, Any]:
    backbone, side = NETWORKS[network]
    side = args.image_size or side
    algorithms = {name: make(name, backbone, side) for name in ["ERM", *args.algorithms]}
    batches = images(side, args.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in algorithms}
    for number in range(args.warmup + args.steps):
        for name, algorithm in algorithms.items():
            start = time.perf_counter()
            algorithm.update(batches)
            if number >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{network} at {side} px, {DOMAINS} x {args.batch_size} images")
    for name, times in seconds.items():
        ratio = medians[name] / medians["ERM"]
        told = "" if name == "ERM" else f"  {ratio:5.2f} x ERM"
        if name == "DQMQ":
            told += f", target {TARGET:g}: {'met' if ratio <= TARGET else 'MISSED'}"
            told += f"; {widths_in_use(algorithms[name], batches):.1f} widths a layer in use"
        print(f"  {name:22} {medians[name]:8.3f} s ({min(times):.3f} to {max(times):.3f}){told}", flush=True)
    return {name: {"median": medians[name], "seconds": times} for name, times in seconds.items()}


def make(name: str, backbone: str, side: int) -> Algorithm:
    overrides = {"backbone": backbone, "weights": "none", "image_size": side}
    values = hparams.resolve_hparams(name, "PACS", overrides=overrides)
    seed_everything(0)
    algorithm: Any = registry.get(name).cls((3, side, side), CLASSES, DOMAINS, values)
    algorithm.total_steps = TOTAL_STEPS
    algorithm.step = FIRST_STEP
    networks.set_precision(algorithm, "fp32", channels_last=True)
    return algorithm


def images(side: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(DOMAINS):
        x = torch.randn(batch_size, 3, side, side, generator=generator)
        contrast = torch.rand(batch_size, 1, 1, 1, generator=generator)
        x = contrast * x + torch.randn(batch_size, 1, 1, 1, generator=generator)
        batches.append((x, torch.randint(CLASSES, (batch_size,), generator=generator)))
    return batches


def widths_in_use(algorithm: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    """How many widths a layer draws for one batch, averaged over the layers with a policy."""
    with torch.no_grad(), algorithm.control.traced("sampled") as trace:
        algorithm.network(torch.cat([x for x, _ in batches]))
    return statistics.mean(len(choice.index.unique()) for choices in trace.values() for choice in choices)


if __name__ == "__main__":
    sys.exit(main())
