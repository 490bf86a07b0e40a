"""What an algorithm is called, where it comes from and what can be tuned about it.

`register` is the only thing a new algorithm needs: its data drives the command line, the hparams, the tables
and the contract tests. Other packages register through the entry-point group `domainbed_sfp.algorithms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.hparam import Hparam, checked_value
from domainbed_sfp.core.registry import Registry, origin_of

STANDINGS = ("reference", "published", "reconstruction")

ClassT = TypeVar("ClassT", bound=type)


@dataclass(frozen=True)
class AlgorithmInfo:
    """An algorithm's entry in the registry.

    standing: `reference` (an uncompressed objective or a floor such as random pruning), `published` (built from
    the paper or its code) or `reconstruction` (the source does not determine it; no table may claim otherwise).
    retired: hparams that earlier versions had, and the one value that is built in now.
    """

    name: str
    cls: type
    family: str
    reference: str
    standing: str
    hparams: Mapping[str, Hparam] = field(default_factory=dict)
    retired: Mapping[str, Any] = field(default_factory=dict)

    def current(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Hparams of a run of any version as this one has them: without those that are retired, and with those that did
        not exist yet. Raises UserError as `without_retired` does."""
        added = {name: hparam.earlier for name, hparam in self.hparams.items() if hparam.earlier is not None}
        return {**added, **self.without_retired(values)}

    def without_retired(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` without retired hparams. Raises UserError where one of these has another value than is built in."""
        for name in values.keys() & self.retired.keys():
            built_in, value = self.retired[name], values[name]
            if value != built_in or isinstance(value, bool) is not isinstance(built_in, bool):
                raise UserError(
                    f"hparam {name!r} of {self.name} is {value!r:.80}: it is built in as {built_in!r} now; only "
                    "the version that the run's records name as `commit` can build it with another value"
                )
        return {name: value for name, value in values.items() if name not in self.retired}

    def make(self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]) -> Any:
        """A new instance of the algorithm (see `algorithms.base.Algorithm` for the arguments). Raises UserError as
        `checked` does."""
        return self.cls(input_shape, num_classes, num_domains, self.checked(hparams))

    def checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`current` values, checked to be of their hparams' kinds and in range; a UserError says which is not. What
        `resolve_hparams` gives is so; a record or DomainBed's registry can say anything."""
        values = self.current(values)
        table = dict(self.hparams)
        if "objective" in table:
            table.update(get_objective(values["objective"]).hparams)
        own = {name: checked_value(self.name, name, values[name], table[name]) for name in values.keys() & table}
        return {**values, **own}


@dataclass(frozen=True)
class ObjectiveInfo:
    """A training objective that algorithms with an `objective` hparam can use."""

    name: str
    cls: type
    hparams: Mapping[str, Hparam] = field(default_factory=dict)


ALGORITHMS: Registry[AlgorithmInfo] = Registry(
    "algorithm",
    "domainbed_sfp.algorithms",
    "algorithms",
    beyond="one of your own comes as an installed package, which `domainbed-sfp new` writes; a file path/to/method.py "
    "works with `domainbed-sfp check` only",
)
OBJECTIVES: Registry[ObjectiveInfo] = Registry("objective", "domainbed_sfp.algorithms", "objectives")


def register(
    name: str,
    *,
    family: str,
    reference: str,
    standing: str = "published",
    hparams: Mapping[str, Hparam] | None = None,
    retired: Mapping[str, Any] | None = None,
) -> Callable[[ClassT], ClassT]:
    """Class decorator: makes the class known as algorithm `name`.

    retired: hparams that earlier versions had, and the one value that is built in now.

    Raises UserError for a name that is taken, and for an unknown standing.
    """
    if standing not in STANDINGS:
        raise unknown_name(f"standing of algorithm {name}", standing, STANDINGS)

    def decorate(cls: ClassT) -> ClassT:
        info = AlgorithmInfo(name, cls, family, reference, standing, dict(hparams or {}), dict(retired or {}))
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
