"""Our algorithms and hparams where a DomainBed checkout looks for its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.domainbed_facts import SMALL_IMAGES
from domainbed_sfp.core.hparam import Hparam
from domainbed_sfp.data import dataset_names
from domainbed_sfp.training.hparams import hparam_table
from domainbed_sfp.upstream.checkout import Checkout

# What our loaders and our loop do, and DomainBed's do not.
OUR_LOOPS_HPARAMS = ("degrade", "degraded_evaluation")

# Our data sets whose hparams hold for those of DomainBed that we do not have.
SMALL_STAND_IN, LARGE_STAND_IN = "RotatedMNIST", "PACS"


def own_names(checkout: Checkout) -> list[str]:
    """Names of our algorithms that mean nothing in the checkout; the others are left to it."""
    return [name for name in registry.names() if not hasattr(checkout.algorithms, name)]


def register_algorithms(checkout: Checkout, names: Sequence[str], steps: int | None) -> None:
    """Puts our classes where DomainBed looks algorithms up, and their names behind its own.

    DomainBed does not tell an algorithm how long the run is, from which schedules take their fractions: the
    class that is registered is a subclass that knows. It can be pickled: it is found where it says it is.
    """
    module = checkout.algorithms
    for name in names:
        original = registry.get(name).cls
        attributes: dict[str, Any] = {
            "__module__": module.__name__,
            "__doc__": original.__doc__,
            "__init__": _with_checked_hparams(name),
        }
        if steps is not None:
            attributes["total_steps"] = steps
        setattr(module, name, type(name, (original,), attributes))
        module.ALGORITHMS.append(name)


def _with_checked_hparams(name: str) -> Callable[..., None]:
    """The constructor of algorithm `name`, for hparams that nobody has checked yet."""
    info = registry.get(name)

    def construct(
        self: Any, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        info.cls.__init__(self, input_shape, num_classes, num_domains, info.checked(hparams))  # type: ignore[misc]

    return construct


def register_hparams(checkout: Checkout, names: Collection[str], overrides: Mapping[str, Any]) -> None:
    """Makes DomainBed's registry answer for our algorithms from our tables.

    `overrides` is the run's `--hparams`, which decides whose objective's hparams belong to the table.
    """
    theirs = checkout.hparams_registry._hparams

    def _hparams(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
        if algorithm not in names:
            return theirs(algorithm, dataset, random_seed)
        table = own_table(algorithm, dataset, overrides)
        return {name: (hparam.default, hparam.draw(name, random_seed)) for name, hparam in table.items()}

    checkout.hparams_registry._hparams = _hparams  # type: ignore[attr-defined]


def own_table(algorithm: str, dataset: str, overrides: Mapping[str, Any]) -> dict[str, Hparam]:
    """Our hparams of an algorithm on a data set of DomainBed, less `image_size`, which its loaders decide, and what
    only our loop does."""
    table = hparam_table(algorithm, stand_in(dataset), overrides)
    for name in ("image_size", *OUR_LOOPS_HPARAMS):
        del table[name]
    return table


def stand_in(dataset: str) -> str:
    """The data set of ours whose hparams hold: the same, or for one we do not have, one of its kind."""
    if dataset in dataset_names():
        return dataset
    return SMALL_STAND_IN if dataset in SMALL_IMAGES else LARGE_STAND_IN
