"""The masks and costs of the chosen checkpoints, by each run's network built anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import summary
from domainbed_sfp.leaderboard.bundle.layout import MASKS
from domainbed_sfp.leaderboard.documents.problems import Problem, counted, shown
from domainbed_sfp.leaderboard.facts import facts_of
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation import settled
from domainbed_sfp.leaderboard.validation.compression import SPARSITY_ROUNDING
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of
from domainbed_sfp.leaderboard.validation.masks import Masks, check_units, masks_of, read_masks
from domainbed_sfp.leaderboard.validation.networks import Network
from domainbed_sfp.pruning import costs
from domainbed_sfp.runs.records import COST_FIELDS


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
    chosen, needed = chosen_checkpoints(bundle), set()
    for run in bundle.runs:
        numbers = [n for n, one in enumerate(run.records, start=1) if (run.name, one["step"]) in chosen]
        network = _network(bundle, run) if numbers else None
        for number in numbers:
            if file := masks_of(run, number):
                needed.add(file)
            yield from _of_a_checkpoint(bundle, run, number, network, recomputed[run.run.dataset])
    for dataset, names in claimed.items():
        bundle.unverified[dataset] = [name for name in COST_FIELDS if name in names - recomputed[dataset]]
    for name in bundle.tree.names(MASKS):
        if name not in needed:
            yield Problem(name, "", "masks of a checkpoint that a selection rule chooses", "others")


def _network(bundle: Bundle, run: BundleRun) -> Network | None:
    """The run's network, None where it cannot be built here or its number of classes is not known."""
    if facts_of(run.run.dataset) is None:
        bundle.cannot(f"costs on {run.run.dataset}: its number of classes is not known here")
        return None
    if run.name not in bundle.expected:  # why has been told
        return None
    network = bundle.network_of(run)
    try:
        network.positions  # noqa: B018 - computed once, here
    except Exception as error:  # a network that takes no image of this shape
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        bundle.cannot(f"masks and costs of {run.run.algorithm}: its network cannot be run here ({reason})")
        return None
    return network


def chosen_checkpoints(bundle: Bundle) -> set[tuple[str, int]]:
    """(run, step) of the checkpoints that the selection rules choose."""
    found = set()
    for dataset in {run.run.dataset for run in bundle.runs}:
        results = summary.results_of([one.run for one in bundle.runs if one.run.dataset == dataset])
        for _, choices in results.values():
            found |= {(one.run.directory, one.run.steps[one.checkpoint]) for one in choices}
    return found


def _of_a_checkpoint(
    bundle: Bundle, run: BundleRun, number: int, network: Network | None, recomputed: set[str]
) -> Iterator[Problem]:
    """The masks of a chosen checkpoint and its costs. `recomputed` loses the names of those that do not follow."""
    file = masks_of(run, number)
    masks: Masks | None = {}
    if file is not None:
        masks, problems = read_masks(bundle, run, number, network, file)
        yield from problems
    if masks is None or network is None:
        recomputed.clear()
        return
    if file is not None:
        yield from check_units(file, network, masks)
    known = _known_costs(network, masks)
    yield from _differing_costs(run, number, network, masks, known, file or records_of(run))
    recomputed &= {*(known.keys() & run.records[number - 1].keys()), "sparsity"}


def _known_costs(network: Network, masks: Masks) -> dict[str, float | int | None]:
    """The costs that follow from a network and its masks, by their names in a record."""
    cost = costs.measure_cost(network.deployed, network.positions, masks)
    known = {name: getattr(cost, name) for name in ("parameters", "surviving_parameters", "dense_macs", "macs")}
    return known | settled.settled(network.algorithm, network.costs, masks)


def _differing_costs(
    run: BundleRun, number: int, network: Network, masks: Masks, known: Mapping[str, float | int | None], file: str
) -> Iterator[Problem]:
    where, record = records_of(run), run.records[number - 1]
    for name in known.keys() & record.keys():
        if (expected := known[name]) != record[name]:
            words = "null" if expected is None else f"{expected:,}"
            yield Problem(where, f"line {number}.{name}", f"{words}, by {file}", counted(record[name]))
    removed = costs.sparsities_of(network.algorithm, masks) or {"weight": 0.0}
    if all(abs(value - record["sparsity"]) > SPARSITY_ROUNDING for value in removed.values()):
        words = " or ".join(f"{value:.6g} of the {unit}s" for unit, value in removed.items())
        yield Problem(where, f"line {number}.sparsity", f"{words}, by {file}", shown(record["sparsity"]))
