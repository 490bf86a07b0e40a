"""Masks are those of the method: of its parameters, of the units that it removes, as many as its hparams ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import torch

from domainbed_sfp.algorithms.base import ObjectiveAlgorithm
from domainbed_sfp.algorithms.pruning.scheduled import ScheduledPruning
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.bundle import mask_headers
from domainbed_sfp.leaderboard.bundle.layout import MASKS
from domainbed_sfp.leaderboard.documents.problems import Problem
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of
from domainbed_sfp.leaderboard.validation.networks import Network
from domainbed_sfp.pruning.groups import ChannelGroup, channel_groups
from domainbed_sfp.pruning.masks import lower_channels
from domainbed_sfp.runs import mask_files

Masks = Mapping[str, torch.Tensor]


def masks_of(run: BundleRun, number: int) -> str | None:
    """The file of a record's masks, by its name in the bundle; None where the record names none."""
    digest = run.records[number - 1].get("masks")
    return None if digest is None else f"{MASKS}/{digest}{mask_files.SUFFIX}"


def read_masks(
    bundle: Bundle, run: BundleRun, number: int, network: Network | None, file: str
) -> tuple[Masks | None, list[Problem]]:
    """The masks of a record, None and why where they are not the network's. What it cannot have is not unpacked."""
    where, record = records_of(run), run.records[number - 1]
    if bundle.claimed and bundle.claimed.get("without_masks"):
        bundle.cannot("masks: its author did not keep them, so that sparsity and costs are what the records say")
        return None, []
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
        whose, wanted = run.run.algorithm, network.mask_shapes
        words = f"a parameter {'of' if wanted is None else 'that is masked by'} {whose}"
        misfit = mask_headers.misfits(file, declared, network.shapes if wanted is None else wanted, words)
        if misfit is None and wanted is not None and (lacking := wanted.keys() - declared.keys()):
            misfit = Problem(file, f"mask {min(lacking)}", f"one, as {whose} masks this parameter", "none")
        if misfit:
            return None, [misfit]
    try:
        masks = mask_files.unpack(data)
    except UserError as error:
        return None, [Problem(file, "", "masks, one bit a weight", str(error))]
    if (digest := mask_files.digest(masks)) != record["masks"]:
        return None, [Problem(file, "digest of the masks", record["masks"], digest)]
    return masks, []


def check_units(file: str, network: Network, masks: Masks) -> Iterator[Problem]:
    """No layer is wiped out, channels are masked whole, and every ranking has removed as much as it was asked to."""
    for name, mask in masks.items():
        if not mask.any():
            yield Problem(file, f"mask {name}", "something that lives", f"none of {mask.numel():,}")
            return
    algorithm = network.algorithm
    alive: dict[str, torch.Tensor] = dict(masks)
    if algorithm.granularity == "channel":
        groups = _groups(network)
        alive = {group.name: _living(masks, group) for group in groups}
        found = list(_partly_masked(file, network, groups, masks, alive))
        yield from found
        if found:
            return
    if network.code is None and isinstance(algorithm, ScheduledPruning):
        yield from _wrong_counts(file, algorithm.removed_in_the_end(), alive)


def _groups(network: Network) -> list[ChannelGroup]:
    """The channels that the method may remove; for one that does not say so all that can be."""
    algorithm = network.algorithm
    groups: list[ChannelGroup] = list(getattr(algorithm, "groups", []))
    if not groups and isinstance(algorithm, ObjectiveAlgorithm):
        with suppress(UserError):  # a network without channels that may be removed
            groups = channel_groups(algorithm.featurizer, algorithm.classifier, residual_streams=True)
    return groups


def _living(masks: Masks, group: ChannelGroup) -> torch.Tensor:
    """[channels], where a channel's filter has a weight that lives."""
    filters = masks.get(group.filters[0])
    return torch.ones(group.channels, dtype=torch.bool) if filters is None else filters.flatten(1).any(1)


def _partly_masked(
    file: str, network: Network, groups: Iterable[ChannelGroup], masks: Masks, alive: Masks
) -> Iterator[Problem]:
    """Masks are what taking out the dead channels gives: their filters, biases, normalization and readers."""
    whole = lower_channels(groups, alive, network.shapes, torch.device("cpu"))
    for name in sorted({*whole, *masks}):
        one = torch.ones(network.shapes[name], dtype=torch.bool)
        expected, found = whole.get(name, one), masks.get(name, one)
        if not torch.equal(expected, found):
            words = f"{int((~expected).sum()):,} masked weights, those of the channels that are dead"
            more, fewer = int((expected & ~found).sum()), int((~expected & found).sum())
            told = f"{more:,} masked beside them, {fewer:,} of them not masked"
            yield Problem(file, f"mask {name}", words, told)
            return


def _wrong_counts(file: str, removed: Mapping[tuple[str, ...], int], alive: Masks) -> Iterator[Problem]:
    """Of the units that are ranked together, as many are dead as the hparams say."""
    for names, expected in removed.items():
        found = sum(int((~alive[name]).sum()) for name in names)
        if found != expected:
            where = f"units of {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
            yield Problem(file, where, f"{expected:,} removed, by the hparams", f"{found:,}")
            return
