"""What pruning at once costs out of domain and in, by what is removed and what the rest is made to take over.

    python benchmarks/one_shot.py run --output FILE.jsonl --data_dir DIR [--dataset PACS] [--test_env 0] [--seed 90]
        [--steps 100] [--finetune 60] [--samples 500] [--hparams JSON]
    python benchmarks/one_shot.py report FILE.jsonl [--output PAGE.md]

One network is trained densely. Of copies of it channels are taken out at once, by a method's score and in its scope, as
the method itself does it, and what is left is as it was (none), reconstructed to make what its layers made (own), or
to make what the dense network's make of the same images (reference; one layer after another, as SFPAligned does it
while it trains). Each is evaluated on the same images, at once and, where FINETUNED says so, after some steps more
on the same minibatches. `run` continues where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.pruning.scheduled import ScheduledPruning
from domainbed_sfp.analysis.render.grids import ABSENT
from domainbed_sfp.core import provenance, runtime
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_output
from domainbed_sfp.core.overrides import parse_overrides
from domainbed_sfp.core.seeds import seed_everything, seed_hash
from domainbed_sfp.data import Dataset, get_dataset_class
from domainbed_sfp.data.images.augmentation import normalize
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.data.splits import split_environment
from domainbed_sfp.pruning import costs
from domainbed_sfp.pruning.reconstruction import Reconstruction
from domainbed_sfp.pruning.state import Masks
from domainbed_sfp.training import hparams

HOLDOUT = 0.2
# Of each layer that is reconstructed to follow the dense network, and of BatchNorm's statistics.
MINIBATCHES = 10

# (method, scope, share of channels removed, reconstruction); the network itself first.
Case = tuple[str, str, float, str]
DENSE: Case = ("ERM", "layer", 0.0, "none")
FINETUNED: list[Case] = [
    DENSE,
    ("Taylor", "layer", 0.5, "none"),
    ("Taylor", "global", 0.5, "none"),
    ("Taylor", "layer", 0.5, "reference"),
    ("Taylor", "global", 0.5, "reference"),
    ("OBS", "layer", 0.5, "reference"),
    ("Taylor", "global", 0.65, "none"),
    ("Taylor", "global", 0.65, "reference"),
]
CASES: list[Case] = [
    *FINETUNED,
    ("OBS", "layer", 0.5, "own"),
    ("Taylor", "layer", 0.5, "own"),
    ("Taylor", "global", 0.5, "own"),
    ("Random", "layer", 0.5, "none"),
    ("Random", "layer", 0.5, "reference"),
    ("Magnitude", "layer", 0.5, "none"),
    ("Magnitude", "layer", 0.5, "reference"),
]


# Training, pruning and evaluating -------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Adds the lines that are missing to the file."""
    runtime.prepare_for_training()
    settings = {
        name: getattr(args, name) for name in ("dataset", "test_env", "seed", "steps", "finetune", "samples", "hparams")
    }
    path = Path(args.output)
    lines = read(path) if path.exists() else []
    if any(line["settings"] != settings for line in lines):
        raise UserError(f"{path} holds lines of other settings; choose another --output")
    done = {tuple(line["case"]) for line in lines}
    bench = Bench(args)
    for case in CASES:
        if case not in done:
            lines.append({"settings": settings, "case": list(case), **bench.line(case)})
            write_output("--output", path, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
            print(*case, lines[-1]["at_once"], lines[-1]["finetuned"], flush=True)
    bench.loader.close()
    return 0


class Bench:
    """The dense network, its data, and what becomes of copies of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.overrides = parse_overrides(args.hparams)
        cache = Path(args.cache_dir) if args.cache_dir else None
        values = self.hparams_of("Taylor", {"reconstruction": "least_squares"})
        self.dataset: Dataset = get_dataset_class(args.dataset).build(args.data_dir, values, args.seed, cache)
        splits = [
            split_environment(len(each), index, args.seed, HOLDOUT)
            for index, each in enumerate(self.dataset.environments)
        ]
        parts = [(index, split.in_) for index, split in enumerate(splits) if index != args.test_env]
        self.loader = MinibatchLoader(
            self.dataset, parts, values["batch_size"], False, args.seed, torch.device("cpu"), "train", values["degrade"]
        )
        rng = np.random.default_rng(args.seed)
        inside = -(-args.samples // len(parts))
        self.chosen = {
            index: rng.permutation(split.in_)[: args.samples]
            if index == args.test_env
            else rng.permutation(split.out)[:inside]
            for index, split in enumerate(splits)
        }
        # With Taylor's importances and the moments that reconstruction needs, but so long that nothing is pruned.
        self.dense = self.made("Taylor", {"reconstruction": "least_squares"})
        self.dense.total_steps = 1000 * args.steps
        self.train(self.dense, range(args.steps))

    def hparams_of(self, name: str, overrides: dict[str, Any]) -> dict[str, Any]:
        return hparams.resolve_hparams(name, self.args.dataset, overrides={**self.overrides, **overrides})

    def made(self, name: str, overrides: dict[str, Any]) -> ScheduledPruning:
        seed_everything(self.args.seed)
        dataset = self.dataset
        algorithm = registry.get(name).cls(
            dataset.input_shape, dataset.num_classes, len(dataset) - 1, self.hparams_of(name, overrides)
        )
        networks.set_precision(algorithm, "fp32", networks.channels_last_is_faster(algorithm, torch.device("cpu")))
        assert isinstance(algorithm, ScheduledPruning)
        return algorithm

    def train(self, algorithm: ScheduledPruning, steps: range) -> None:
        algorithm.train()
        for step in steps:
            seed_everything(seed_hash(self.args.seed, "step", step))
            algorithm.update(self.loader.minibatches(step))

    def line(self, case: Case) -> dict[str, Any]:
        """What becomes of a case."""
        first = self.args.steps
        pruned = copy.deepcopy(self.dense) if case == DENSE else self.pruned(case)
        masks = pruned.masks()
        positions = costs.count_positions(pruned, self.dataset.input_shape, pruned.predict)
        cost = costs.measure_cost(pruned.deployed_parameters(), positions, masks)
        at_once, finetuned = self.accuracies(pruned), None
        if case in FINETUNED:
            self.train(pruned, range(first + 1, first + 1 + self.args.finetune))
            finetuned = self.accuracies(pruned)
        return {
            "at_once": at_once,
            "finetuned": finetuned,
            "macs": cost.macs / cost.dense_macs,
            "commit": provenance.commit(),
            "environment": provenance.fingerprint(torch.device("cpu")),
        }

    def pruned(self, case: Case) -> ScheduledPruning:
        """A copy of the dense network without what goes: one step of a run of one, in which it is all due."""
        name, scope, sparsity, reconstruction = case
        overrides: dict[str, Any] = {"pruning_scope": scope, "sparsity": sparsity}
        if name != "OBS":
            overrides["reconstruction"] = "least_squares" if reconstruction == "own" else "none"
        algorithm = self.made(name, overrides)
        algorithm.load_state_dict({**algorithm.state_dict(), **self.shared_state(algorithm)})
        algorithm.total_steps, algorithm.step = 1, 0
        self.train(algorithm, range(self.args.steps, self.args.steps + 1))
        if reconstruction == "reference":
            self.follow(algorithm)
        return algorithm

    def shared_state(self, algorithm: ScheduledPruning) -> dict[str, Any]:
        own = algorithm.state_dict()
        return {name: value for name, value in self.dense.state_dict().items() if name in own and "masks" not in name}

    def follow(self, algorithm: ScheduledPruning) -> None:
        """Sets what layers read of living channels such that they make what the dense network's make, one layer after
        another."""
        dense = copy.deepcopy(self.dense)  # to look at it may move its BatchNorm's statistics
        alive = algorithm.unit_masks.as_dict()
        for index, group in enumerate(algorithm.groups):
            following = Reconstruction(algorithm, [group], follows=True)
            first = self.args.steps + index * MINIBATCHES
            for x in self.images(range(first, first + MINIBATCHES)):
                with torch.no_grad(), following.watch(algorithm, True) as seen, following.watch(dense, True) as told:
                    algorithm.predict(x)
                    dense.predict(x)
                following.take(seen, None, told)
            following.take_over(algorithm, Masks(algorithm.unit_shapes), alive, dense)

    def images(self, steps: range) -> Iterator[torch.Tensor]:
        for step in steps:
            yield torch.cat([x for x, _ in self.loader.minibatches(step)])

    @torch.no_grad()
    def accuracies(self, algorithm: ScheduledPruning) -> dict[str, float]:
        """In percent, on the chosen images of the test environment, and the mean of the others' held-out ones."""
        algorithm.prepare_evaluation(self.images(range(MINIBATCHES)))
        algorithm.eval()
        found = {}
        for index, chosen in self.chosen.items():
            environment = self.dataset[index]
            hits = 0
            for part in np.array_split(chosen, -(-len(chosen) // 100)):
                images = environment.gather(part)
                x = normalize(images) if images.dtype == torch.uint8 else images
                hits += int((algorithm.predict(x).argmax(1) == environment.labels[torch.from_numpy(part)]).sum())
            found[index] = 100 * hits / len(chosen)
        algorithm.train()
        inside = [value for index, value in found.items() if index != self.args.test_env]
        return {"out_of_domain": found[self.args.test_env], "in_domain": float(np.mean(inside))}


# What they tell -------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `run` wrote."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a file that `run` wrote ({error})") from error


def report(args: argparse.Namespace) -> int:
    """Prints or writes the page."""
    lines = read(Path(args.file))
    if not lines:
        raise UserError(f"{args.file} holds no line")
    page = "\n".join(page_of(lines)) + "\n"
    if args.output:
        write_output("--output", args.output, page)
    else:
        print(page, end="")
    return 0


def page_of(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The page: a line for each case."""
    settings, environment = lines[0]["settings"], lines[0]["environment"]
    commits = ", ".join(sorted({str(line["commit"])[:12] for line in lines}))
    yield f"# Pruned at once, {settings['dataset']}"
    yield ""
    yield (
        f"One network (seed {settings['seed']}) after {settings['steps']} dense steps; test environment "
        f"{settings['test_env']}, {settings['samples']} images of it and as many held-out ones of the others: one "
        f"standard error is about {50 / settings['samples'] ** 0.5:.0f} points. Then {settings['finetune']} "
        f"steps more. `{settings['hparams']}`; {environment['cpu']}, torch {environment['torch']}; commit {commits}."
    )
    yield ""
    yield "| score | scope | removed | reconstruction | MACs | at once: out | in domain | finetuned: out | in domain |"
    yield "|---|---|--:|---|--:|--:|--:|--:|--:|"
    for line in lines:
        name, scope, sparsity, reconstruction = line["case"]
        once, tuned = line["at_once"], line["finetuned"]
        later = f"{tuned['out_of_domain']:.1f} | {tuned['in_domain']:.1f}" if tuned else f"{ABSENT} | {ABSENT}"
        first = f"{once['out_of_domain']:.1f} | {once['in_domain']:.1f}"
        yield f"| {name} | {scope} | {sparsity:.0%} | {reconstruction} | {line['macs']:.0%} | {first} | {later} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train, prune and evaluate what is missing")
    runs.add_argument("--output", required=True, metavar="FILE.jsonl")
    runs.add_argument("--dataset", default="PACS")
    runs.add_argument("--data_dir")
    runs.add_argument("--cache_dir")
    runs.add_argument("--test_env", type=int, default=0)
    runs.add_argument("--seed", type=int, default=90, help="of splits and minibatches; tables have 0, 1, 2")
    runs.add_argument("--steps", type=int, default=100)
    runs.add_argument("--finetune", type=int, default=60)
    runs.add_argument("--samples", type=int, default=500)
    runs.add_argument("--hparams", default="{}", metavar="JSON")
    runs.set_defaults(call=run)
    told = commands.add_parser("report", help="the page of a file")
    told.add_argument("file")
    told.add_argument("--output", metavar="PAGE.md")
    told.set_defaults(call=report)
    args = parser.parse_args(argv)
    try:
        return args.call(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
