"""A run's network built anew, as its hparams say and with random weights: what its records must follow from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm, final_step_of
from domainbed_sfp.algorithms.pruning.scheduled import ScheduledPruning
from domainbed_sfp.algorithms.quantization.base import QuantizedAlgorithm
from domainbed_sfp.core import provenance
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard.bundle import layout as layout
from domainbed_sfp.leaderboard.facts import facts_of
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.settled import Limits, limits, settle
from domainbed_sfp.pruning import costs
from domainbed_sfp.training import hparams

# Of a data set whose number of classes is not known here: what hparams and schedule decide does not depend on it.
SOME_CLASSES = 4


class TooLarge(Exception):
    """A network of more parameters than are built."""


class Refused(Exception):
    """Hparams that the algorithm does not take."""


@dataclass(frozen=True)
class Expected:
    """What a run's settings say of its records before any training.

    final_step: of the first record at final compression, None where only training can tell. has_masks: whether records
    at final compression name masks, None where only training can tell. sparsity: at final compression, None where
    training decides it. measured: names of the costs that the algorithm gives beyond parameters and MACs. limits:
    between what they lie, by whether compression is final. code: of the algorithm's package, None for this project's
    own. decisions: what the algorithm decides where hparams leave it open.
    """

    final_step: int | None
    has_masks: bool | None
    sparsity: float | None
    measured: frozenset[str]
    limits: Mapping[bool, Limits]
    code: str | None
    decisions: Mapping[str, str]


class Network:
    """A run's algorithm as it begins.

    Raises:
        TooLarge, Refused: see there.
        UserError: where it cannot be built here.
    """

    def __init__(self, run: BundleRun) -> None:
        self.shape = tuple(run.records[0]["input_shape"])
        facts = facts_of(run.run.dataset)
        self.classes = facts.classes if facts else SOME_CLASSES
        self.domains = len(run.records[0]["environments"]) - len(run.run.test_envs)
        self.info = registry.get(run.run.algorithm)
        with torch.random.fork_rng(devices=[]), networks.without_weights():
            if (weights := _featurizer_weights(self.shape, run.run.hparams)) > layout.MOST_PARAMETERS:
                raise TooLarge(f"{weights:,}")
            self.algorithm = self._build(run)
        self.algorithm.total_steps = run.run.args["steps"] or get_dataset_class(run.run.dataset).N_STEPS

    def _build(self, run: BundleRun) -> Algorithm:
        """Raises Refused where the defaults can be met on this backbone, and the run's hparams cannot."""
        try:
            return self._make(run.run.hparams)
        except Exception as error:  # values from a stranger can be anything
            refused = str(error) or type(error).__name__
        usual = hparams.resolve_hparams(self.info.name, run.run.dataset)
        kept = {name: run.run.hparams[name] for name in _OF_THE_NETWORK if name in run.run.hparams}
        try:
            self._make({**usual, **kept})
        except Exception:  # an optional package that is not here, or a network that does not serve
            raise UserError(refused) from None
        raise Refused(refused)

    def _make(self, values: Mapping[str, Any]) -> Algorithm:
        return self.info.make(self.shape, self.classes, self.domains, values)

    @cached_property
    def code(self) -> str | None:
        """The hash of the algorithm's package, None for this project's own."""
        return provenance.code_of(self.info.cls)

    @cached_property
    def positions(self) -> dict[str, int]:
        """How often each weight is used for one image."""
        return costs.count_positions(self.algorithm, self.shape, self.algorithm.predict)

    @cached_property
    def deployed(self) -> dict[str, Tensor]:
        """The parameters of `predict`."""
        return self.algorithm.deployed_parameters()

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all parameters, by name."""
        return {name: parameter.shape for name, parameter in self.algorithm.named_parameters()}

    @cached_property
    def mask_shapes(self) -> dict[str, torch.Size] | None:
        """Shapes of the masks that the method has, by parameter name; None where only training can tell."""
        found = {name: mask.shape for name, mask in self.algorithm.masks().items()}
        return found if found or type(self.algorithm).masks is Algorithm.masks else None

    @cached_property
    def costs(self) -> Mapping[str, float]:
        """The costs of a quantized network with the widths of the finished model, see `costs.settle`."""
        if isinstance(self.algorithm, QuantizedAlgorithm):
            _ = self.positions  # counted with all layers at their widest: policies that choose are layers too
        return settle(self.algorithm)

    def expected(self) -> Expected:
        """What the run's records must say."""
        algorithm = self.algorithm
        final, measured = final_step_of(algorithm), frozenset(self.costs)
        has_masks = None if self.mask_shapes is None else bool(self.mask_shapes)
        if (code := self.code) is not None:  # its author may have changed what a base class of this project's does
            return Expected(final, has_masks, None, measured, {True: {}, False: {}}, code, algorithm.decisions())
        bounds = {is_final: limits(algorithm, self.costs, is_final) for is_final in (True, False)}
        return Expected(final, has_masks, _final_sparsity(algorithm), measured, bounds, None, algorithm.decisions())


# Hparams that choose the network, whatever the method is.
_OF_THE_NETWORK = ("backbone", "weights", "image_size", "resnet18", "resnet50_augmix", "nonlinear_classifier")


def key_of(run: BundleRun) -> str:
    """The same for two runs exactly where their networks and schedules are."""
    first, args = run.records[0], run.run.args
    parts = [args["algorithm"], args["dataset"], args["steps"], run.run.hparams, first["input_shape"]]
    return json.dumps([*parts, len(first["environments"]) - len(args["test_envs"])], sort_keys=True)


def _final_sparsity(algorithm: Algorithm) -> float | None:
    """The sparsity at final compression of one of this project's own methods, None where training decides it."""
    if not isinstance(algorithm, ScheduledPruning):
        return 0.0 if type(algorithm).sparsity is Algorithm.sparsity else None
    removed = algorithm.removed_in_the_end()
    total = sum(shape.numel() for shape in algorithm.unit_shapes.values())
    return sum(removed.values()) / total if removed else None


def _featurizer_weights(shape: tuple[int, ...], values: Mapping[str, Any]) -> int:
    """How many parameters a featurizer would have, without the memory for them; 0 where it cannot be built here."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in networks.make_featurizer(shape, values).parameters())
    except Exception:  # what is wrong is told where the whole network is built
        return 0
