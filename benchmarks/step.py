"""Seconds a training step and images a second: ours, the bare network's, and an upstream checkout's.

    python benchmarks/step.py [--data_dir DIR] [--precision auto fp32 bf16] [--backbone resnet18]
                              [--image_size 224] [--batch_size 32] [--steps 10] [--freeze_bn] [--before DIR]
                              [--json FILE]

Ours is the whole step of our training loop, ERM on three training environments of PACS: reading, augmentation,
update. The bare network is the same backbone in PyTorch's own layers with a linear classifier on one synthetic batch
that is made once, at the same precision and memory format: forward, cross-entropy, backward, Adam. Steps of the two
alternate, so that both see the same machine. Ours sets the process up first (`core/runtime.py`: freed memory is kept),
by which the bare network gains as well; plain is the bare network in a process of its own that PyTorch alone has set
up. With --freeze_bn, BatchNorm is frozen in all of them, and the network as training runs it, with BatchNorm folded,
makes steps on the bare one's batch. --before names a checkout of another version of this project, whose whole step
takes its turn, too. With DOMAINBED_ROOT set to a DomainBed checkout (whose
requirements this Python has), its own loaders and its own ERM are timed, for the ResNets at 224 px that it has. Weights
are random: they do not matter here. Without --data_dir, images are made. Prints medians, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from domainbed_sfp.core import provenance, runtime
from domainbed_sfp.core.device import choose_device
from domainbed_sfp.data.splits import split_environment
from domainbed_sfp.networks import ImageFeaturizer
from domainbed_sfp.runs.settings import PRECISIONS, RunSettings
from domainbed_sfp.training.loop import update
from domainbed_sfp.training.setup import Setup, prepare
from domainbed_sfp.training.state import State
from domainbed_sfp.upstream import bridge as upstream

ENVIRONMENTS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")

# The first environment is held out, so that a step has 3 x batch_size images.
TEST_ENVS = [0]

UPSTREAM_SIDE = 224
UPSTREAM_BACKBONES = ("resnet18", "resnet50")

# What we promise for ResNet-18 at 224 px, 3 x 32 images: our step against the other's.
TARGETS = {"upstream": 0.5, "bare": 1.15}

# And with frozen BatchNorm, in fp32: the folded network's step against the plain one's, by backbone and image size.
FROZEN_TARGETS = {("efficientnet_lite0", 128): 0.70, ("resnet18", 224): 0.97, ("resnet50", 224): 0.97}

Step = Callable[[], object]


def main() -> int:
    args = parse_arguments()
    if args.serve != "plain":
        runtime.prepare_for_training()
    with tempfile.TemporaryDirectory() as folder:
        data_dir, cache_dir = args.data_dir, args.cache_dir
        if data_dir is None:
            data_dir, cache_dir = folder, f"{folder}/cache"
            make_pacs(Path(folder) / "PACS", args.batch_size)
        if args.serve:
            return serve(args, data_dir, cache_dir, Path(folder))
        report = measure_ours_and_bare(args, data_dir, cache_dir, Path(folder))
        if reason := upstream_unavailable(args):
            print(f"upstream: not timed, {reason}")
        else:
            report["steps"]["upstream fp32"] = measure_upstream(args, data_dir, Path(folder))
    report["ratios"] = ratios(report)
    print_ratios(report, args)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="folder that holds PACS/; default: made images")
    parser.add_argument("--cache_dir", help="where decoded images of --data_dir are kept")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["auto", "fp32", "bf16"])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image_size", type=int, default=UPSTREAM_SIDE)
    parser.add_argument("--batch_size", type=int, default=32, help="images per environment, of which there are 3")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those, not timed")
    parser.add_argument("--freeze_bn", action="store_true", help="BatchNorm in evaluation mode, everywhere")
    parser.add_argument("--before", help="a checkout of another version of this project, to time beside this one")
    parser.add_argument("--json", help="file to write the report to")
    parser.add_argument("--serve", choices=("ours", "plain"), help=argparse.SUPPRESS)  # see `served_step`
    return parser.parse_args()


def make_pacs(root: Path, batch_size: int) -> None:
    """A tree in PACS's layout with 227 px JPEG files of smooth colours and noise, about as large as PACS's own;
    enough of them that a batch fits into the training split."""
    rng = np.random.default_rng(0)
    per_class = max(8, -(-2 * batch_size // len(CLASSES)))
    for env in ENVIRONMENTS:
        for name in CLASSES:
            (root / env / name).mkdir(parents=True)
            for index in range(per_class):
                coarse = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((227, 227), Image.Resampling.BICUBIC), dtype=np.float32)
                noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / env / name / f"{index}.jpg")


# Ours and the bare network ----------------------------------------------------------------------------------


def measure_ours_and_bare(
    args: argparse.Namespace, data_dir: str, cache_dir: str | None, folder: Path
) -> dict[str, Any]:
    """Times every precision asked for; what `auto` stands for is timed once."""
    report: dict[str, Any] = {"settings": vars(args), "steps": {}}
    for precision in args.precision:
        run = make_run(args, data_dir, cache_dir, precision, folder)
        if "environment" not in report:
            report["environment"] = provenance.fingerprint(run.device)
            report["commit"] = provenance.commit()
            print(describe(report["environment"], args))
        if precision == "auto":
            report["auto"] = run.precision
            print(f"precision auto is {run.precision} here")
        if f"ours {run.precision}" not in report["steps"]:
            steps = {"ours": timed(our_step(run), run.device), "bare": timed(network_step(run, args), run.device)}
            if args.freeze_bn:
                steps["folded"] = timed(network_step(run, args, is_folded=True), run.device)
            with ExitStack() as servers:
                for name, checkout in (("plain", None), ("before", args.before)):
                    if name == "plain" or checkout:
                        server = served_step(args, data_dir, cache_dir, run.precision, checkout)
                        steps[name] = servers.enter_context(server)
                try:
                    times = alternate(list(steps.values()), args.warmup, args.steps)
                finally:
                    run.loader.close()
            for name, seconds in zip(steps, times):
                report["steps"][f"{name} {run.precision}"] = summary(f"{name} {run.precision}", seconds, args)
        else:
            run.loader.close()
    return report


def make_run(args: argparse.Namespace, data_dir: str, cache_dir: str | None, precision: str, folder: Path) -> Setup:
    """The training loop's own run, about to begin. Not a copy of what it does: what is timed is what trains."""
    chosen = {
        "backbone": args.backbone,
        "weights": "none",
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "freeze_bn": args.freeze_bn,
    }
    settings = RunSettings(
        data_dir=data_dir,
        dataset="PACS",
        algorithm="ERM",
        hparams=json.dumps(chosen),
        test_envs=TEST_ENVS,
        output_dir=str(folder),
        precision=precision,
        cache_dir=cache_dir,
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return prepare(settings, folder)


def our_step(run: Setup) -> Step:
    state = State(run)

    def step() -> None:
        update(run, state)
        state.step += 1

    return step


def network_step(run: Setup, args: argparse.Namespace, is_folded: bool = False) -> Step:
    """A step of the same backbone and classifier with nothing around them: bare, in PyTorch's own layers, or folded, as
    training runs it."""
    # Imported here because an earlier version, which this file may be run on, need not have them.
    from domainbed_sfp.networks.convolutions import DepthwiseConv2d, SameConv2d

    featurizer = run.algorithm.featurizer
    if not isinstance(featurizer, ImageFeaturizer):
        sys.exit(f"--backbone {args.backbone}: expected a network for photographs, such as resnet18")
    body = featurizer if is_folded else featurizer.network
    network = nn.Sequential(copy.deepcopy(body), copy.deepcopy(run.algorithm.classifier)).train()
    for module in () if is_folded else network.modules():
        # In evaluation mode our convolutions are PyTorch's.
        if isinstance(module, (DepthwiseConv2d, SameConv2d)) or (args.freeze_bn and isinstance(module, nn.BatchNorm2d)):
            module.eval()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-5)
    generator = torch.Generator().manual_seed(0)
    images = 3 * args.batch_size
    x = torch.randn(images, 3, args.image_size, args.image_size, generator=generator).to(run.device)
    y = torch.randint(len(CLASSES), (images,), generator=generator).to(run.device)
    if featurizer.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def step() -> float:
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# In processes of their own ----------------------------------------------------------------------------------


@contextmanager
def served_step(
    args: argparse.Namespace, data_dir: str, cache_dir: str | None, precision: str, checkout: str | None
) -> Iterator[Callable[[], float]]:
    """A function that has another process make a step and returns its seconds: the whole step of another version's
    `checkout`, or the bare network in a process that nobody has set up."""
    command = [sys.executable, __file__, "--serve", "ours" if checkout else "plain", "--precision", precision,
               "--data_dir", data_dir, "--backbone", args.backbone, "--image_size", str(args.image_size),
               "--batch_size", str(args.batch_size)]  # fmt: skip
    command += ["--freeze_bn"] * args.freeze_bn + (["--cache_dir", cache_dir] if cache_dir else [])
    paths = {**os.environ, "PYTHONPATH": str(Path(checkout).resolve())} if checkout else None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=paths) as server:
        assert server.stdin and server.stdout
        to, back = server.stdin, server.stdout

        def seconds() -> float:
            print("step", file=to, flush=True)
            told = back.readline()
            if not told:
                sys.exit(f"{checkout or 'the bare network'} cannot be timed by this version's benchmark")
            return float(told)

        try:
            yield seconds
        finally:
            to.close()


def serve(args: argparse.Namespace, data_dir: str, cache_dir: str | None, folder: Path) -> int:
    """Makes a step for each line that comes, and answers with its seconds."""
    run = make_run(args, data_dir, cache_dir, args.precision[0], folder)
    step = timed(our_step(run) if args.serve == "ours" else network_step(run, args), run.device)
    for _ in sys.stdin:
        print(step(), flush=True)
    run.loader.close()
    return 0


# The upstream checkout --------------------------------------------------------------------------------------


def upstream_unavailable(args: argparse.Namespace) -> str | None:
    """Why there is no upstream to compare with; None where there is one."""
    if not os.environ.get("DOMAINBED_ROOT"):
        return "DOMAINBED_ROOT is not set"
    if args.backbone not in UPSTREAM_BACKBONES or args.image_size != UPSTREAM_SIDE:
        return f"it has {' and '.join(UPSTREAM_BACKBONES)} at {UPSTREAM_SIDE} px only"
    return None


def measure_upstream(args: argparse.Namespace, data_dir: str, folder: Path) -> dict[str, Any]:
    """Times the checkout's ERM on its own loaders, as its train puts them together, less its evaluation loaders
    (whose processes would only compete with the first steps)."""
    root = upstream.find_checkout(os.environ["DOMAINBED_ROOT"])
    with upstream.opened(root) as checkout, random_weights(args.backbone, folder / "torch_home"):
        hparams = checkout.hparams_registry.default_hparams("ERM", "PACS")
        hparams.update(resnet18=args.backbone == "resnet18", resnet50_augmix=False)
        hparams.update(batch_size=args.batch_size, freeze_bn=args.freeze_bn)
        dataset = checkout.datasets.PACS(data_dir, TEST_ENVS, hparams)
        batches = zip(*training_loaders(dataset, args.batch_size))
        device = choose_device("auto")
        algorithm = checkout.algorithms.ERM(
            dataset.input_shape, dataset.num_classes, len(dataset) - len(TEST_ENVS), hparams
        ).to(device)

        def step() -> None:
            algorithm.update([(x.to(device), y.to(device)) for x, y in next(batches)], None)

        (seconds,) = alternate([timed(step, device)], args.warmup, args.steps)
    return summary("upstream fp32", seconds, args)


def training_loaders(dataset: Any, batch_size: int) -> list[Any]:
    """The checkout's loaders of the training environments, with its splits and its number of workers."""
    from domainbed.lib.fast_data_loader import InfiniteDataLoader

    loaders = []
    for env_i, samples in enumerate(dataset):
        if env_i not in TEST_ENVS:
            keys = split_environment(len(samples), env_i, trial_seed=0, holdout_fraction=0.2).in_
            part = torch.utils.data.Subset(samples, keys.tolist())
            loaders.append(InfiniteDataLoader(part, None, batch_size, dataset.N_WORKERS))
    return loaders


@contextmanager
def random_weights(backbone: str, torch_home: Path) -> Iterator[None]:
    """Puts random weights where torchvision looks for those it has downloaded: upstream always asks for them."""
    source = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    target = torch_home / "hub" / "checkpoints" / Path(source.url).name
    target.parent.mkdir(parents=True)
    torch.save(getattr(torchvision.models, backbone)(weights=None).state_dict(), target)
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(torch_home)
    try:
        yield
    finally:
        del os.environ["TORCH_HOME"]
        if before is not None:
            os.environ["TORCH_HOME"] = before


# Timing and telling -----------------------------------------------------------------------------------------


def timed(step: Step, device: torch.device) -> Callable[[], float]:
    """A function that runs `step` to its end on the device and returns its seconds."""

    def seconds() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return seconds


def alternate(steps: Sequence[Callable[[], float]], warmup: int, rounds: int) -> list[list[float]]:
    """Seconds of each of `steps`, which take turns; the first `warmup` rounds do not count."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(warmup + rounds):
        for step, times in zip(steps, seconds):
            took = step()
            if number >= warmup:
                times.append(took)
    return seconds


def summary(name: str, seconds: list[float], args: argparse.Namespace) -> dict[str, Any]:
    """Prints a line about the step times and returns it as data."""
    median = statistics.median(seconds)
    images = 3 * args.batch_size / median
    print(
        f"{name:13} {median:8.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f}) {images:9.1f} images/s",
        flush=True,
    )
    return {"median": median, "images_per_second": images, "seconds": seconds}


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """Our median step time over the others': the bare network's, as it is and in a plain process, and the earlier
    version's at each precision, and upstream's."""
    steps = report["steps"]
    found = {}
    for precision in ("fp32", "bf16"):
        for ours, others in (("ours", ("bare", "plain", "before", "upstream")), ("folded", ("bare", "plain"))):
            for other in others:
                one, two = f"{ours} {precision}", f"{other} {'fp32' if other == 'upstream' else precision}"
                if one in steps and two in steps:
                    found[f"{one} / {two}"] = steps[one]["median"] / steps[two]["median"]
    return found


def print_ratios(report: dict[str, Any], args: argparse.Namespace) -> None:
    """The ratios, and beside those we promise something about whether they keep to it."""
    promised = (args.backbone, args.image_size, args.batch_size) == ("resnet18", 224, 32)
    auto = report.get("auto")
    for name, ratio in report["ratios"].items():
        against = name.split(" / ")[1].split()[0]
        # Against upstream, the promise is about the precision that we choose ourselves.
        target = TARGETS.get(against) if promised and (against == "bare" or name.startswith(f"ours {auto} ")) else None
        if args.freeze_bn:
            is_promised = name == "folded fp32 / plain fp32"
            target = FROZEN_TARGETS.get((args.backbone, args.image_size)) if is_promised else None
        if target is not None:
            told = "met" if ratio <= target else "MISSED"
            print(f"{name:32} {ratio:6.2f}   target {target:.2f}: {told}")
        else:
            print(f"{name:32} {ratio:6.2f}")


def describe(fingerprint: dict[str, Any], args: argparse.Namespace) -> str:
    """The line that says what was timed, and on what."""
    return (
        f"{fingerprint['cpu']}, {fingerprint['device']}, {fingerprint['threads']} threads, "
        f"torch {fingerprint['torch']}, torchvision {fingerprint['torchvision']}; "
        f"{args.backbone} at {args.image_size} px, 3 x {args.batch_size} images, {args.steps} steps"
    )


if __name__ == "__main__":
    sys.exit(main())
