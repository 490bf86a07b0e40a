"""What an algorithm is called, where it comes from and what can be tuned about it.

`register` is the only thing a new algorithm needs: its data drives the command line, the hparams, the tables
and the contract tests. Other packages register through the entry-point group `domainbed_sfp.algorithms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from domainbed_sfp.core.errors import unknown_name
from domainbed_sfp.core.hparam import Hparam
from domainbed_sfp.core.registry import Registry, origin_of

STANDINGS = ("reference", "published", "reconstruction")

ClassT = TypeVar("ClassT", bound=type)


@dataclass(frozen=True)
class AlgorithmInfo:
    """An algorithm's entry in the registry.

    standing: `reference` (an uncompressed objective or a floor such as random pruning), `published` (built from
    the paper or its code) or `reconstruction` (the source does not determine it; no table may claim otherwise).
    """

    name: str
    cls: type
    family: str
    reference: str
    standing: str
    hparams: Mapping[str, Hparam] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveInfo:
    """A training objective that algorithms with an `objective` hparam can use."""

    name: str
    cls: type
    hparams: Mapping[str, Hparam] = field(default_factory=dict)


ALGORITHMS: Registry[AlgorithmInfo] = Registry("algorithm", "domainbed_sfp.algorithms", "algorithms")
OBJECTIVES: Registry[ObjectiveInfo] = Registry("objective", "domainbed_sfp.algorithms", "objectives")


def register(
    name: str,
    *,
    family: str,
    reference: str,
    standing: str = "published",
    hparams: Mapping[str, Hparam] | None = None,
) -> Callable[[ClassT], ClassT]:
    """Class decorator: makes the class known as algorithm `name`.

    Raises UserError for a name that is taken, and for an unknown standing.
    """
    if standing not in STANDINGS:
        raise unknown_name(f"standing of algorithm {name}", standing, STANDINGS)

    def decorate(cls: ClassT) -> ClassT:
        info = AlgorithmInfo(name, cls, family, reference, standing, dict(hparams or {}))
        ALGORITHMS.add(name, info, origin_of(cls))
        return cls

    return decorate


def register_objective(name: str, hparams: Mapping[str, Hparam] | None = None) -> Callable[[ClassT], ClassT]:
    """Class decorator: makes the class known as objective `name` (see `algorithms.base.Objective`)."""

    def decorate(cls: ClassT) -> ClassT:
        OBJECTIVES.add(name, ObjectiveInfo(name, cls, dict(hparams or {})), origin_of(cls))
        return cls

    return decorate


def get(name: str) -> AlgorithmInfo:
    """The entry of algorithm `name`; a UserError with the nearest name if there is none."""
    return ALGORITHMS.get(name)


def get_objective(name: str) -> ObjectiveInfo:
    """The entry of objective `name`; a UserError with the nearest name if there is none."""
    names()  # a package that brings algorithms may bring their objectives
    return OBJECTIVES.get(name)


def names() -> list[str]:
    """Names of all algorithms: references first, then the others, each in the order of their names."""
    return sorted(ALGORITHMS.names(), key=lambda name: (ALGORITHMS.entries[name].family != "objective", name))
