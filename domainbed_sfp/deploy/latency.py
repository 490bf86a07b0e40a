"""What the surgery buys on this machine: seconds a batch takes in the dense and in the exported network."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms.quantization.base import QuantizedAlgorithm
from domainbed_sfp.core import console, provenance
from domainbed_sfp.core.device import choose_device
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.deploy.export import compact
from domainbed_sfp.deploy.finished_runs import load_run

# Rounds before those that count: caches fill, kernels are chosen.
WARMUP = 3

# Beyond these a measurement does not end, or torch and the system give up.
MOST = {"repeats": 10**6, "threads": 4096, "batch_sizes": 10**6}


@dataclass(frozen=True)
class Timing:
    """Milliseconds a batch: median and quartiles over all repetitions."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        lower, median, upper = (1e3 * float(value) for value in np.percentile(seconds, [25, 50, 75]))
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower_quartile:.2f} to {self.upper_quartile:.2f})"


@dataclass(frozen=True)
class Comparison:
    """Dense against exported at one batch size. speedup: the ratio of the medians."""

    batch_size: int
    dense: Timing
    exported: Timing
    speedup: float


def compare_latency(
    dense: nn.Module,
    exported: nn.Module,
    input_shape: tuple[int, ...],
    batch_sizes: Sequence[int],
    repeats: int,
    device: torch.device,
) -> list[Comparison]:
    """Times two networks in fp32 (not TF32) and channels_last, which is the faster memory format for both.

    Batches of the two alternate and change who goes first, so that whatever else the machine does meets both alike.
    Raises UserError for a batch that does not fit into memory.
    """
    with torch.inference_mode(), _without_tf32():
        pair = [_prepared(network, device) for network in (dense, exported)]
        comparisons = []
        for batch_size in batch_sizes:
            try:
                images = torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
                images = images.contiguous(memory_format=torch.channels_last)
                seconds = alternate([_timed(network, images, device) for network in pair], WARMUP, repeats)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
                    raise
                raise UserError(f"a batch of {batch_size} images does not fit into the memory of {device}") from error
            slow, fast = (Timing.of(values) for values in seconds)
            comparisons.append(Comparison(batch_size, slow, fast, slow.median / fast.median))
    return comparisons


def alternate(steps: Sequence[Callable[[], float]], warmup: int, repeats: int) -> list[list[float]]:
    """What each of `steps` returns, round by round; the first `warmup` rounds do not count. Every other round runs
    backwards."""
    results: list[list[float]] = [[] for _ in steps]
    for number in range(warmup + repeats):
        for index in range(len(steps)) if number % 2 == 0 else reversed(range(len(steps))):
            result = steps[index]()
            if number >= warmup:
                results[index].append(result)
    return results


def measure(
    folder: str,
    batch_sizes: Sequence[int],
    repeats: int,
    threads: int | None,
    device_name: str,
    output: str | None,
) -> None:
    """Prints the latency of a run's dense and exported network, and writes it with hardware and versions to `output`.

    Raises UserError for settings that cannot be, a run that cannot be exported, or a file that cannot be written.
    """
    for name, value in (("repeats", repeats), ("threads", threads), *(("batch_sizes", size) for size in batch_sizes)):
        if value is not None and not 1 <= value <= MOST[name]:
            words = "at least 1" if value < 1 else f"at most {MOST[name]}"
            raise UserError(f"--{name}: expected whole numbers of {words}, got {value}")
    if output is not None and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise UserError(f"--output {output!r}: expected the name of a file in a folder that is there")
    device = choose_device(device_name)
    run = load_run(folder)
    if isinstance(run.algorithm, QuantizedAlgorithm):
        raise UserError(
            f"run {folder!r} is quantized, which torch only simulates in floating point: there is no speed to measure "
            "here; export it with --format onnx and time it where it will run"
        )
    made = compact(run)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        found = compare_latency(made.masked, made.network, made.description.input_shape, batch_sizes, repeats, device)
        report = {
            "run": folder,
            "backbone": made.description.backbone,
            "input_shape": made.description.input_shape,
            "repeats": repeats,
            "unit": "milliseconds a batch",
            "precision": "fp32",
            **asdict(made.cost),
            "stored_zeros": made.stored_zeros,
            "latency": [asdict(comparison) for comparison in found],
            "environment": provenance.fingerprint(device),
            "commit": provenance.commit(),
        }
    finally:
        torch.set_num_threads(before)
    show(found, report["environment"])
    if made.removed == 0:
        print("No channel is taken out: the two networks are the same.")
    if output is not None:
        try:
            write_atomically(output, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--output {output!r} cannot be written: {error.strerror or error}") from error


def show(comparisons: Sequence[Comparison], fingerprint: dict[str, Any]) -> None:
    """Prints the comparisons as a table, and what they were measured on."""
    rows: console.Rows = [("batch", "dense, ms (quartiles)", "exported, ms (quartiles)", "speedup")]
    rows += [(str(one.batch_size), str(one.dense), str(one.exported), f"{one.speedup:.2f}") for one in comparisons]
    console.show(rows)
    hardware = fingerprint["device"] if fingerprint["device"] != "cpu" else fingerprint["cpu"]
    print(f"{hardware}, {fingerprint['threads']} threads, torch {fingerprint['torch']}")


@contextmanager
def _without_tf32() -> Iterator[None]:
    """While it lasts, CUDA computes convolutions in the precision of their tensors, which torch by itself does not."""
    backends: tuple[Any, Any] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


def _prepared(network: nn.Module, device: torch.device) -> nn.Module:
    network = copy.deepcopy(network).eval().to(device)
    networks.set_precision(network, "fp32", channels_last=True)
    return network


def _timed(network: nn.Module, images: torch.Tensor, device: torch.device) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return seconds
