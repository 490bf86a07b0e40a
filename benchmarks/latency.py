"""Milliseconds a batch takes in a dense network and in the one whose dead channels are gone.

    python benchmarks/latency.py [--backbones efficientnet_lite0 resnet18] [--image_sizes 224 64] [--batch_size 32]
                                 [--sparsity 0.5] [--prune_residual_streams] [--repeats 30] [--threads N]
                                 [--device cpu] [--json FILE]

Channels are removed as a run of Magnitude with default hparams removes them: the same fraction of every layer, residual
streams whole unless asked; weights are random, which does not matter here. Batches of the two networks alternate.
Prints medians and quartiles, the speedup, and what share of the MACs is left, above which no speedup can be expected.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from domainbed_sfp import networks
from domainbed_sfp.core import provenance
from domainbed_sfp.core.device import choose_device
from domainbed_sfp.deploy import shrink
from domainbed_sfp.deploy.export import compare
from domainbed_sfp.deploy.exported import ExportedNetwork
from domainbed_sfp.deploy.latency import compare_latency, show
from domainbed_sfp.pruning import costs
from domainbed_sfp.pruning.groups import channel_groups
from domainbed_sfp.pruning.masks import keep_highest, lower_channels
from domainbed_sfp.pruning.scores import by_group, channel_magnitude
from domainbed_sfp.training import hparams

CLASSES = 7

# What we promise on a CPU at 50 % of channels and batch size 32: dense over exported.
TARGET = 1.5


def main() -> int:
    args = parse_arguments()
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "settings": vars(args),
        "environment": provenance.fingerprint(device),
        "commit": provenance.commit(),
        "results": [measure(args, name, size, device) for name in args.backbones for size in args.image_sizes],
    }
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0", "resnet18"])
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224, 64])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction of the prunable channels of every layer")
    parser.add_argument("--prune_residual_streams", action="store_true", help="remove channels of residual streams too")
    parser.add_argument("--repeats", type=int, default=30, help="timed batches of each network")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", help="file to write the report to")
    return parser.parse_args()


def measure(args: argparse.Namespace, backbone: str, size: int, device: torch.device) -> dict[str, Any]:
    """Times one backbone at one image size, prints it and returns it as data."""
    shape = (3, size, size)
    dense, masks = pruned_by_magnitude(backbone, shape, args.sparsity, args.prune_residual_streams)
    exported, _ = shrink.remove_channels(dense, masks, shape)
    compare(dense, exported, torch.randn(2, *shape), "random")
    plain = ExportedNetwork(dense[0], dense[1])
    cost = costs.measure_cost(dict(plain.named_parameters()), costs.count_positions(plain, shape), masks)
    print(
        f"{backbone}, {size} px: {cost.macs / cost.dense_macs:.1%} of {cost.dense_macs / 1e6:,.0f} million MACs left, "
        f"{cost.surviving_parameters / cost.parameters:.1%} of {cost.parameters / 1e6:.1f} million parameters",
        flush=True,
    )
    found = compare_latency(dense, exported, shape, [args.batch_size], args.repeats, device)
    show(found, provenance.fingerprint(device))
    speedup = found[0].speedup
    if (args.sparsity, args.batch_size, device.type) == (0.5, 32, "cpu"):
        print(f"speedup {speedup:.2f}   target {TARGET:.2f}: {'met' if speedup >= TARGET else 'MISSED'}", flush=True)
    return {
        "backbone": backbone,
        "image_size": size,
        **asdict(cost),
        "dense_bytes": shrink.exported_bytes(dense, {}),
        "exported_bytes": shrink.exported_bytes(dense, masks),
        **asdict(found[0]),
    }


@torch.no_grad()
def pruned_by_magnitude(
    backbone: str, shape: tuple[int, ...], sparsity: float, residual_streams: bool = False
) -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    """A network with random weights, and masks of the channels of smallest norm, whose weights are zero."""
    torch.manual_seed(0)
    values = hparams.resolve_hparams("ERM", "PACS", overrides={"backbone": backbone, "weights": "none"})
    featurizer = networks.make_featurizer(shape, values)
    classifier = networks.make_classifier(featurizer.n_outputs, CLASSES)
    groups = channel_groups(featurizer, classifier, residual_streams=residual_streams)
    parameters = dict(ExportedNetwork(featurizer, classifier).named_parameters())
    alive = keep_highest(by_group(channel_magnitude, groups, parameters), sparsity)
    shapes = {name: value.shape for name, value in parameters.items()}
    masks = lower_channels(groups, alive, shapes, torch.device("cpu"))
    for name, mask in masks.items():
        parameters[name].mul_(mask)
    return nn.Sequential(featurizer, classifier).eval(), masks


if __name__ == "__main__":
    sys.exit(main())
