"""Where a training step with frozen BatchNorm spends its time: each convolution with the BatchNorm behind it.

    python benchmarks/layers.py [--backbone efficientnet_lite0] [--image_size 128] [--batch_size 48] [--repeats 7]
                                [--json FILE]

For each distinct layer of the backbone: milliseconds of its forward and of its backward pass in PyTorch's own layers
and in ours (folded, with our convolutions), which take turns, and how often the backbone has it. The shortest of the
repeats counts, in fp32 and the memory format that training chooses.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp import networks
from domainbed_sfp.core import provenance, runtime
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.networks.folding import Folding
from domainbed_sfp.training import hparams


def main() -> int:
    args = parse_arguments()
    runtime.prepare_for_training()
    featurizer = make_featurizer(args)
    found = find_layers(featurizer, args)
    kinds = Counter(key for key, _ in found.values())
    rows = []
    for name, (key, pair) in found.items():
        if kinds[key]:
            rows.append(measure(name, key, pair, kinds.pop(key), args))
            print(line(rows[-1]), flush=True)
    total = {f"{whose}_{way}": sum(row["count"] * row[f"{whose}_{way}"] for row in rows) for whose, way in COLUMNS}
    print(line({"name": "all layers", "count": len(found), **total}))
    if args.json:
        report = {"settings": vars(args), "environment": provenance.fingerprint(torch.device("cpu")),
                  "commit": provenance.commit(), "layers": rows, "total": total}  # fmt: skip
        write_atomically(Path(args.json), json.dumps(report, indent=1) + "\n")
    return 0


COLUMNS = [(whose, way) for whose in ("plain", "ours") for way in ("forward", "backward")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=48, help="images of a step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="file to write the report to")
    return parser.parse_args()


def make_featurizer(args: argparse.Namespace) -> networks.ImageFeaturizer:
    chosen = {"backbone": args.backbone, "weights": "none", "freeze_bn": True, "resnet_dropout": 0.0}
    values = hparams.resolve_hparams("ERM", "PACS", overrides=chosen)
    featurizer = networks.make_featurizer((3, args.image_size, args.image_size), values)
    if not isinstance(featurizer, networks.ImageFeaturizer):
        sys.exit(f"--backbone {args.backbone}: expected a network for photographs, such as resnet18")
    networks.set_precision(featurizer, "fp32", channels_last=True)
    return featurizer.train()


def find_layers(
    featurizer: networks.ImageFeaturizer, args: argparse.Namespace
) -> dict[str, tuple[tuple[Any, ...], nn.Sequential]]:
    """By name of the convolution: what tells it from others, and a copy of it with its BatchNorm."""
    names = {module: name for name, module in featurizer.network.named_modules()}
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    pairs = featurizer.folding.of(featurizer.network)
    for convolution, _ in pairs:
        convolution.register_forward_pre_hook(lambda module, inputs: shapes.update({module: tuple(inputs[0].shape)}))
    featurizer(torch.zeros(args.batch_size, 3, args.image_size, args.image_size))
    found = {}
    for convolution, norm in pairs:
        parts = (convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.stride)
        key = (*parts, convolution.groups, shapes[convolution])
        pair = nn.Sequential(copy.deepcopy(convolution), copy.deepcopy(norm))
        pair[0]._forward_pre_hooks.clear()
        found[names[convolution]] = (key, pair)
    return found


def measure(
    name: str, key: tuple[Any, ...], pair: nn.Sequential, count: int, args: argparse.Namespace
) -> dict[str, Any]:
    """The shortest milliseconds of either pass, in PyTorch's layers and in ours."""
    inputs, outputs, kernel, stride, groups, shape = key
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_(inputs != 3)
    # In evaluation mode our convolutions are PyTorch's.
    plain = copy.deepcopy(pair).eval()
    ours = pair.train()
    ours[1].eval()
    folding = Folding()

    def folded(x: Tensor) -> Tensor:
        with folding.applied(ours):
            return ours(x)

    gradient = torch.randn_like(plain(x))
    times: dict[str, list[float]] = {f"{whose}_{way}": [] for whose, way in COLUMNS}
    for _ in range(args.repeats):
        for whose, run in (("plain", plain), ("ours", folded)):
            forward, backward = passes(run, x, gradient)
            times[f"{whose}_forward"].append(forward)
            times[f"{whose}_backward"].append(backward)
    kind = "depthwise " if groups > 1 else ""
    about = f"{kind}{kernel[0]}x{kernel[1]} / {stride[0]}, {inputs} -> {outputs} at {shape[2]} px"
    return {"name": name, "about": about, "count": count, **{key: min(each) for key, each in times.items()}}


def passes(run: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    x.grad = None
    start = time.perf_counter()
    out = run(x)
    middle = time.perf_counter()
    out.backward(gradient)
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def line(row: dict[str, Any]) -> str:
    plain, ours = (row[f"{whose}_forward"] + row[f"{whose}_backward"] for whose in ("plain", "ours"))
    numbers = " ".join(f"{row[f'{whose}_{way}']:8.2f}" for whose, way in COLUMNS)
    return (
        f"{row['name']:28} {row.get('about', ''):44} x{row['count']:<3} {numbers} ms   ours / plain {ours / plain:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
