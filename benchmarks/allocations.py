"""Does the best allocation of bit-widths depend on an image's quality? DQMQ's premise, tested by itself.

    python benchmarks/allocations.py run --output FILE.jsonl [--dataset FullColoredDigits] [--test_env 2] [--seeds 8]
        [--bits 3] [--steps 150] [--finetune 40] [--samples 250] [--hparams JSON] [--data_dir DIR]
    python benchmarks/allocations.py report FILE.jsonl [--output PAGE.md]

For each seed a network is trained at 8 bits on images of which half are degraded. Of it, each static allocation whose
BitOPs are those of the uniform network of `--bits` (or up to 10 % below) is trained further, on the same minibatches,
and evaluated on the same images of the test environment, as they are and in every degradation and severity. In a
network of a few layers these are all allocations there are; in a deep one uniform widths, widths that rise or fall with
depth, that are larger in the middle or at the ends, and random ones.

The report tells the best allocation of each degradation and severity, and what choosing by quality would gain over the
best single allocation: chosen on all seeds but one and told on that one, for what is best on the same images is so by
chance too. A network of its own for each allocation is more than DQMQ has, whose widths share their weights: what the
choice gains here is a ceiling. `run` continues where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed_sfp import networks
from domainbed_sfp.algorithms.quantization.uniform_quant import UniformQuant
from domainbed_sfp.analysis.render.grids import ABSENT
from domainbed_sfp.analysis.significance import holm, paired_test
from domainbed_sfp.core import provenance, runtime
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_output
from domainbed_sfp.core.overrides import parse_overrides
from domainbed_sfp.core.seeds import seed_everything, seed_hash
from domainbed_sfp.data import Dataset, get_dataset_class
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.data.splits import split_environment
from domainbed_sfp.quantization.bitops import EXHAUSTIVE_SEARCH, fit_shifts
from domainbed_sfp.quantization.policy import WIDTHS
from domainbed_sfp.training import hparams
from domainbed_sfp.training.evaluation import evaluate_degraded

# How far below the budget an allocation of a few layers may be.
TOLERANCE = 0.1
# Bits between the widest and the narrowest layers of a deep network's allocations.
SPREAD = 4.0
RANDOM_ALLOCATIONS = 2
HOLDOUT = 0.2
# The splits of tables (trials 0, 1, ...) are not looked at.
FIRST_SEED = 90
RECALIBRATION_BATCHES = 10

Allocation = tuple[int, ...]


def allocations(macs: Sequence[int], bits: int) -> dict[str, Allocation]:
    """Static widths by name, of layers of so many MACs, at the BitOPs of the uniform network of `bits`."""
    budget = sum(macs) * bits**2
    if len(WIDTHS) ** len(macs) <= EXHAUSTIVE_SEARCH:
        costs = {
            widths: sum(count * width**2 for count, width in zip(macs, widths))
            for widths in product(WIDTHS, repeat=len(macs))
        }
        fitting = [widths for widths, cost in costs.items() if (1 - TOLERANCE) * budget <= cost <= budget]
        return {"-".join(map(str, widths)): widths for widths in fitting}
    depth = torch.linspace(-0.5, 0.5, len(macs))
    shapes = {
        "uniform": torch.zeros(len(macs)),
        "early layers wide": -depth,
        "late layers wide": depth,
        "middle wide": 0.5 - 2 * depth.abs(),
        "ends wide": 2 * depth.abs() - 0.5,
    }
    for number in range(RANDOM_ALLOCATIONS):
        drawn = torch.rand(len(macs), generator=torch.Generator().manual_seed(number))
        shapes[f"random {number}"] = drawn - 0.5
    widths = torch.tensor(WIDTHS)
    found = {}
    for name, shape in shapes.items():
        means = bits + SPREAD * shape
        fitted = means if name == "uniform" else means + fit_shifts(means[None], macs, budget)
        found[name] = tuple(widths[(fitted[:, None] - widths).abs().argmin(1)].tolist())
    return found


# Training and evaluating them -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Adds the lines that are missing to the file."""
    runtime.prepare_for_training()
    values = hparams.resolve_hparams(
        "UniformQuant", args.dataset, overrides={**parse_overrides(args.hparams), "bits": 8}
    )
    settings = {name: getattr(args, name) for name in ("dataset", "test_env", "steps", "finetune", "samples")}
    settings["hparams"] = values
    path = Path(args.output)
    lines = read(path) if path.exists() else []
    if any(line["settings"] != settings for line in lines):
        raise UserError(f"{path} holds lines of other settings; choose another --output")
    done = {(line["seed"], line["bits"], line["allocation"]) for line in lines}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for line in evaluated(args, values, seed, done):
            lines.append({"settings": settings, **line})
            write_output("--output", path, "".join(json.dumps(each, sort_keys=True) + "\n" for each in lines))
            print(f"seed {seed}, {line['bits']} bits, {line['allocation']}: {mean_accuracy(line):.1f} %", flush=True)
    return 0


def evaluated(
    args: argparse.Namespace, values: dict[str, Any], seed: int, done: set[tuple[int, int, str]]
) -> Iterator[dict[str, Any]]:
    """A line for each allocation of a seed that is not done."""
    cache = Path(args.cache_dir) if args.cache_dir else None
    dataset = get_dataset_class(args.dataset).build(args.data_dir, values, seed, cache)
    seed_everything(seed)
    algorithm = UniformQuant(dataset.input_shape, dataset.num_classes, len(dataset) - 1, values)
    networks.set_precision(algorithm, "fp32", networks.channels_last_is_faster(algorithm, torch.device("cpu")))
    algorithm.total_steps = args.steps + args.finetune
    inner = list(algorithm.macs)[1:-1]
    wanted = [
        (bits, name, widths)
        for bits in args.bits
        for name, widths in allocations([algorithm.macs[layer] for layer in inner], bits).items()
        if (seed, bits, name) not in done
    ]
    if not wanted:
        return
    loader, calibration = loaders(dataset, args.test_env, values, seed)
    train(algorithm, loader, range(args.steps), seed)
    for bits, name, widths in wanted:
        candidate = copy.deepcopy(algorithm)
        for layer, width in zip(inner, widths):
            candidate.layers[layer].set_bits(width)
            candidate.layers[layer].start_widths()
        train(candidate, loader, range(args.steps, args.steps + args.finetune), seed)
        candidate.prepare_evaluation(
            torch.cat([x for x, _ in calibration.minibatches(step)]) for step in range(RECALIBRATION_BATCHES)
        )
        cases = evaluate_degraded(candidate, dataset, args.test_env, torch.device("cpu"), args.samples)
        costs = candidate.costs()
        yield {
            "seed": seed,
            "bits": bits,
            "allocation": name,
            "widths": list(widths),
            "bitops": costs["bitops"] / costs["bitops_8bit"],
            "cases": [[case["degradation"], case["severity"], case["accuracy"]] for case in cases],
            "images": cases[0]["samples"],
            "commit": provenance.commit(),
            "environment": provenance.fingerprint(torch.device("cpu")),
        }
    loader.close()
    calibration.close()


def loaders(
    dataset: Dataset, test_env: int, values: dict[str, Any], seed: int
) -> tuple[MinibatchLoader, MinibatchLoader]:
    """Of the training environments: for steps, and for BatchNorm's statistics."""
    parts = [
        (index, split_environment(len(each), index, seed, HOLDOUT).in_)
        for index, each in enumerate(dataset.environments)
        if index != test_env
    ]
    made = [
        MinibatchLoader(
            dataset, parts, values["batch_size"], False, seed, torch.device("cpu"), stream, values["degrade"]
        )
        for stream in ("train", "recalibration")
    ]
    return made[0], made[1]


def train(algorithm: UniformQuant, loader: MinibatchLoader, steps: Iterable[int], seed: int) -> None:
    algorithm.train()
    for step in steps:
        seed_everything(seed_hash(seed, "step", step))
        algorithm.update(loader.minibatches(step))


# What they tell -------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `run` wrote."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a file that `run` wrote ({error})") from error


def mean_accuracy(line: dict[str, Any]) -> float:
    """Over all cases, in percent."""
    return 100 * float(np.mean([accuracy for _, _, accuracy in line["cases"]]))


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
    """The page: a section for each budget."""
    settings = lines[0]["settings"]
    commits = ", ".join(sorted({line["commit"][:12] for line in lines}))
    made_on = {(each["cpu"], each["torch"]) for each in (line["environment"] for line in lines)}
    machines = ", ".join(f"{cpu}, torch {version}" for cpu, version in sorted(made_on))
    yield f"# The best static allocation by degradation and severity, {settings['dataset']}"
    yield ""
    values = settings["hparams"]
    yield (
        f"Test environment {settings['test_env']}, {lines[0]['images']} images; {settings['steps']} steps at 8 bits, "
        f"then {settings['finetune']} of each allocation on the same minibatches; {values['batch_size']} images an "
        f"environment at {values['image_size']} px, half of them degraded; backbone {values['backbone']}; "
        f"{machines}; commit {commits}."
    )
    for bits in sorted({line["bits"] for line in lines}):
        yield from _section([line for line in lines if line["bits"] == bits], bits)


def _section(lines: Sequence[dict[str, Any]], bits: int) -> Iterator[str]:
    cases, names, accuracies = table_of(lines)
    seeds = len(accuracies)
    cost = {line["allocation"]: line["bitops"] for line in lines}
    means = accuracies.mean(0)  # [cases, allocations]
    single = int(means.mean(0).argmax())
    best = means.argmax(1)
    leads = [accuracies[:, case, best[case]] - accuracies[:, case, single] for case in range(len(cases))]
    tests = [paired_test(lead.tolist()) for lead in leads]
    corrected = holm([test.p_t for test in tests])
    yield f"\n## At the BitOPs of {bits} bits\n"
    yield f"{len(names)} allocations, {seeds} seeds. Best single allocation: {names[single]}.\n"
    yield "| Allocation | BitOPs | As they are | Degraded, mean |"
    yield "| --- | --: | --: | --: |"
    clean = [case for case, (_, severity) in enumerate(cases) if not severity]
    rest = [case for case, (_, severity) in enumerate(cases) if severity]
    for index in means.mean(0).argsort()[::-1]:
        told = f"{means[clean, index].mean():.1f} | {means[rest, index].mean():.1f}"
        yield f"| {names[index]} | {cost[names[index]]:.4f} | {told} |"
    yield "\n| Degradation | Severity | Best allocation | Its accuracy | Best single's | Lead | 95 % | p (Holm) |"
    yield "| --- | --: | --- | --: | --: | --: | --: | --: |"
    for case, (kind, severity) in enumerate(cases):
        test, name = tests[case], names[best[case]]
        interval = f"{test.interval.low:+.1f} to {test.interval.high:+.1f}" if test.interval else ABSENT
        p = ABSENT if corrected[case] is None else f"{corrected[case]:.2f}"
        own, other = means[case, best[case]], means[case, single]
        yield f"| {kind} | {severity} | {name} | {own:.1f} | {other:.1f} | {own - other:+.1f} | {interval} | {p} |"
    yield "\nLeads are those of the best on these very images; chance alone makes some.\n"
    yield "| A choice for each | seems to gain | gains on a seed it was not made on | 95 % | p |"
    yield "| --- | --: | --: | --: | --: |"
    for what, groups in groupings(cases).items():
        test = paired_test(held_out_gains(accuracies, groups).tolist())
        interval = f"{test.interval.low:+.2f} to {test.interval.high:+.2f}" if test.interval else ABSENT
        p = ABSENT if test.p_t is None else f"{test.p_t:.2f}"
        seems = gain(accuracies.mean(0), accuracies.mean(0), groups)
        yield f"| {what} | {seems:+.2f} | {test.difference:+.2f} | {interval} | {p} |"
    yield (
        "\nAccuracy in percent, gains in points over the best single allocation, means over all cases. Intervals are "
        "Student's over seeds; choices made on all seeds but one are nearly the same, so that they are a little narrow."
    )


def table_of(lines: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, int]], list[str], np.ndarray]:
    """(degradation, severity) of the cases, names of the allocations, and accuracies in percent [seeds, cases,
    allocations], of the seeds that have all allocations."""
    names = list(dict.fromkeys(line["allocation"] for line in lines))
    cases = [(kind, severity) for kind, severity, _ in lines[0]["cases"]]
    found = {(line["seed"], line["allocation"]): [100 * case[2] for case in line["cases"]] for line in lines}
    seeds = sorted({line["seed"] for line in lines})
    whole = [seed for seed in seeds if all((seed, name) in found for name in names)]
    if not whole:
        raise UserError("no seed has all allocations yet; `run` goes on where it was")
    accuracies = np.array([[found[seed, name] for name in names] for seed in whole])
    return cases, names, accuracies.transpose(0, 2, 1)


def groupings(cases: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """By what a policy may choose: the group of each case."""
    kinds = list(dict.fromkeys(kind for kind, _ in cases))
    return {
        "degradation and severity": list(range(len(cases))),
        "degradation": [kinds.index(kind) for kind, _ in cases],
        "severity": [severity for _, severity in cases],
    }


def gain(chosen_on: np.ndarray, told_on: np.ndarray, groups: Sequence[int]) -> float:
    """Points by which the best allocation of each group is ahead of the best single one, mean over cases; both are
    chosen on one table of accuracies [cases, allocations] and told on another."""
    single = chosen_on.mean(0).argmax()
    labels = np.array(groups)
    choice = np.array([chosen_on[labels == group].mean(0).argmax() for group in groups])
    return float((told_on[np.arange(len(groups)), choice] - told_on[:, single]).mean())


def held_out_gains(accuracies: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """`gain` on each seed, chosen on the mean of the others: [seeds]."""
    if len(accuracies) < 2:
        raise UserError("a report needs two whole seeds: one to choose on, one to tell what it gains")
    return np.array(
        [gain(np.delete(accuracies, seed, 0).mean(0), accuracies[seed], groups) for seed in range(len(accuracies))]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train and evaluate what is missing")
    runs.add_argument("--output", required=True, metavar="FILE.jsonl")
    runs.add_argument("--dataset", default="FullColoredDigits")
    runs.add_argument("--data_dir")
    runs.add_argument("--cache_dir")
    runs.add_argument("--test_env", type=int, default=2)
    runs.add_argument("--seeds", type=int, default=8, help="how many")
    runs.add_argument("--first_seed", type=int, default=FIRST_SEED, help="several files can be joined into one")
    runs.add_argument("--bits", type=int, nargs="+", default=[3])
    runs.add_argument("--steps", type=int, default=150, help="at 8 bits")
    runs.add_argument("--finetune", type=int, default=40, help="steps of each allocation")
    runs.add_argument("--samples", type=int, default=250, help="images of the test environment")
    runs.add_argument("--hparams", default='{"backbone": "mnist_cnn_bn", "batch_size": 32}')
    runs.set_defaults(command=run)
    reports = commands.add_parser("report", help="the page of what a run found")
    reports.add_argument("file")
    reports.add_argument("--output", metavar="PAGE.md")
    reports.set_defaults(command=report)
    args = parser.parse_args(argv)
    try:
        return int(args.command(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
