"""The masks and costs of the chosen checkpoints, by each run's network built anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_sfp import networks, registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.errors import UserError
from domainbed_sfp.leaderboard import bundle as layout
from domainbed_sfp.leaderboard import costs, mask_headers, summary
from domainbed_sfp.leaderboard.bundle import MASKS
from domainbed_sfp.leaderboard.facts import facts_of
from domainbed_sfp.leaderboard.schema import Problem, shown
from domainbed_sfp.leaderboard.summary import SubmittedRun
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of
from domainbed_sfp.pruning import accounting, mask_files
from domainbed_sfp.records import COST_FIELDS

# The claimed sparsity is a ratio of counts that the masks give as well.
SPARSITY_ROUNDING = 1e-6

Masks = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """A run's algorithm as it begins, how often each of its weights is used, the parameters and costs of `predict`."""

    algorithm: Algorithm
    positions: Mapping[str, int]
    deployed: Mapping[str, torch.Tensor]
    costs: Mapping[str, float]


def check_costs(bundle: Bundle) -> Iterator[Problem]:
    """Masks belong to the network, and costs follow from both; what does not follow is noted in `unverified`."""
    document = bundle.document
    if document is None:
        return
    claimed = {
        dataset: {name for result in one["results"].values() for name in result["costs"]}
        for dataset, one in document["datasets"].items()
    }
    recomputed = {dataset: set(names) for dataset, names in claimed.items()}
    chosen, needed = _chosen(bundle), set()
    for run in bundle.runs:
        numbers = [n for n, one in enumerate(run.records, start=1) if (run.name, one["step"]) in chosen]
        if not numbers:
            continue
        network, problems = build_network(bundle, run)
        yield from problems
        for number in numbers:
            if file := masks_of(run, number):
                needed.add(file)
            yield from _of_a_checkpoint(bundle, run, number, network, recomputed[run.run.dataset])
    for dataset, names in claimed.items():
        bundle.unverified[dataset] = [name for name in COST_FIELDS if name in names - recomputed[dataset]]
    for name in bundle.tree.names(MASKS):
        if name not in needed:
            yield Problem(name, "", "masks of a checkpoint that a selection rule chooses", "others")


def masks_of(run: SubmittedRun, number: int) -> str | None:
    """The file of a record's masks, by its name in the bundle; None where the record names none."""
    digest = run.records[number - 1].get("masks")
    return None if digest is None else f"{MASKS}/{digest}{mask_files.SUFFIX}"


def build_network(bundle: Bundle, run: SubmittedRun) -> tuple[Network | None, list[Problem]]:
    """The run's network built anew, None where that cannot be done here."""
    facts, shape = facts_of(run.run.dataset), tuple(run.records[0]["input_shape"])
    if facts is None:
        bundle.cannot(f"costs on {run.run.dataset}: its number of classes is not known here")
        return None, []
    values = {**run.run.hparams, "weights": "none"}  # what is counted does not depend on them
    domains = len(run.records[0]["environments"]) - len(run.run.test_envs)
    if (weights := _featurizer_weights(shape, values)) > layout.MOST_PARAMETERS:
        words = f"a network of at most {layout.MOST_PARAMETERS:,} parameters"
        return None, [Problem(records_of(run), "line 1.hparams.backbone", words, f"{weights:,}")]
    try:
        algorithm = registry.get(run.run.algorithm).cls(shape, facts.classes, domains, values)
        algorithm.total_steps = run.run.args["steps"] or get_dataset_class(run.run.dataset).N_STEPS
        positions = accounting.count_positions(algorithm, shape, algorithm.predict)
        return Network(algorithm, positions, algorithm.deployed_parameters(), algorithm.costs()), []
    except Exception as error:  # an optional package that is not here, or hparams that fit no network
        bundle.cannot(f"masks and costs of {run.run.algorithm}: its network cannot be built here ({error})")
        return None, []


def _featurizer_weights(shape: tuple[int, ...], values: Mapping[str, Any]) -> int:
    """How many parameters a featurizer would have, without the memory for them; 0 where it cannot be built here."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in networks.make_featurizer(shape, values).parameters())
    except Exception:  # what is wrong is told where the whole network is built
        return 0


def _chosen(bundle: Bundle) -> set[tuple[str, int]]:
    """(run, step) of the checkpoints that the selection rules choose."""
    found = set()
    for dataset in {run.run.dataset for run in bundle.runs}:
        results = summary.results_of([one.run for one in bundle.runs if one.run.dataset == dataset])
        for _, choices in results.values():
            found |= {(one.run.directory, one.run.steps[one.checkpoint]) for one in choices}
    return found


def _of_a_checkpoint(
    bundle: Bundle, run: SubmittedRun, number: int, network: Network | None, recomputed: set[str]
) -> Iterator[Problem]:
    """The masks of a chosen checkpoint and its costs. `recomputed` loses the names of those that do not follow."""
    if network is None:
        recomputed.clear()
    file = masks_of(run, number)
    masks: Masks | None = {}
    if file is not None:
        masks, problems = _read_masks(bundle, run, number, network, file)
        yield from problems
    if masks is not None and network is not None:
        known = _known_costs(network, masks)
        yield from _differing_costs(run, number, network, masks, known, file or records_of(run))
        recomputed &= {*(known.keys() & run.records[number - 1].keys()), "sparsity"}


def _read_masks(
    bundle: Bundle, run: SubmittedRun, number: int, network: Network | None, file: str
) -> tuple[Masks | None, list[Problem]]:
    """The masks of a record, None and why where they are not the network's. What it cannot have is not unpacked."""
    where, record = records_of(run), run.records[number - 1]
    if file not in bundle.tree.sums:
        return None, [Problem(file, "", f"the masks of {where}, line {number}", "no file")]
    data = bundle.tree.read(file)
    try:
        declared = mask_headers.shapes_of(data)
    except ValueError as error:
        return None, [Problem(file, "", "masks, one bit a weight", f"not a file of masks ({error})")]
    weights = sum(map(math.prod, declared.values()))
    if weights > record["parameters"]:
        words = f"at most {record['parameters']:,} weights, the parameters of {where}, line {number}"
        return None, [Problem(file, "masks", words, f"{weights:,}")]
    if network is not None:
        shapes = {name: parameter.shape for name, parameter in network.algorithm.named_parameters()}
        if misfit := mask_headers.misfits(file, declared, shapes, run.run.algorithm):
            return None, [misfit]
    try:
        masks = mask_files.unpack(data)
    except UserError as error:
        return None, [Problem(file, "", "masks, one bit a weight", str(error))]
    if (digest := mask_files.digest(masks)) != record["masks"]:
        return None, [Problem(file, "digest of the masks", record["masks"], digest)]
    return masks, []


def _known_costs(network: Network, masks: Masks) -> dict[str, float | int | None]:
    """The costs that follow from a network and its masks, by their names in a record."""
    cost = accounting.measure_cost(network.deployed, network.positions, masks)
    known = {name: getattr(cost, name) for name in ("parameters", "surviving_parameters", "dense_macs", "macs")}
    return known | costs.settled(network.algorithm, network.costs, masks)


def _differing_costs(
    run: SubmittedRun, number: int, network: Network, masks: Masks, known: Mapping[str, float | int | None], file: str
) -> Iterator[Problem]:
    where, record = records_of(run), run.records[number - 1]
    for name in known.keys() & record.keys():
        if (expected := known[name]) != record[name]:
            words = "null" if expected is None else f"{expected:,}"
            yield Problem(where, f"line {number}.{name}", f"{words}, by {file}", _counted(record[name]))
    for name in ("bitops", "bitops_8bit", "mean_bits"):
        if (name in network.costs) != (record.get(name) is not None):
            words = f"a number, as {run.run.algorithm} is quantized" if name in network.costs else "no such field"
            yield Problem(where, f"line {number}.{name}", words, shown(record.get(name)))
    for name, (low, high) in costs.limits(network.algorithm).items():
        if record.get(name) is not None and not low <= record[name] <= high:
            words = f"from {low:,} to {high:,}, by {run.run.algorithm}'s layers"
            yield Problem(where, f"line {number}.{name}", words, _counted(record[name]))
    removed = accounting.sparsities_of(network.algorithm, masks) or {"weight": 0.0}
    if all(abs(value - record["sparsity"]) > SPARSITY_ROUNDING for value in removed.values()):
        words = " or ".join(f"{value:.6g} of the {unit}s" for unit, value in removed.items())
        yield Problem(where, f"line {number}.sparsity", f"{words}, by {file}", shown(record["sparsity"]))


def _counted(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else shown(value)
