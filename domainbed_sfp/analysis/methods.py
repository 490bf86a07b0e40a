"""Methods: the rows of tables, made of what runs were given; what they are called and when two are one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from domainbed_sfp.core.domainbed_facts import ALGORITHMS, DEFAULT_STEPS, ENVIRONMENTS


@dataclass(frozen=True, slots=True)
class Method:
    """A row of a table: an algorithm with the settings it was given (`--hparams` and `--steps`), as JSON
    texts."""

    algorithm: str
    settings: tuple[tuple[str, str], ...]


def alike(methods: Iterable[Method]) -> dict[Method, Method]:
    """For each method the one that stands for it: those whose settings have the same values are one, however their
    numbers are written (8 and 8.0, as DomainBed's records may have them). It has the float, where one is written so."""
    methods = list(dict.fromkeys(methods))
    spellings: dict[tuple[str, str, str], str] = {}
    for method in methods:
        for name, text in method.settings:
            key = (method.algorithm, name, plain_number(text))
            spellings[key] = max(spellings.get(key, ""), text, key=lambda text: ("." in text or "e" in text, text))
    return {
        method: Method(
            method.algorithm,
            tuple((name, spellings[method.algorithm, name, plain_number(text)]) for name, text in method.settings),
        )
        for method in methods
    }


def plain_number(text: str) -> str:
    """A setting's JSON text with its number, if it is one, written in one way: 8.0 as 8. Words stay: true is not 1."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else repr(number)


def label_methods(methods: Iterable[tuple[str, Method]]) -> dict[str, dict[Method, str]]:
    """Names for the rows of each data set, in the order of its table, from (data set, method) pairs.

    An algorithm seen with one set of settings goes by its name; otherwise the settings that differ within some data set
    are added, as in `Magnitude (sparsity=0.3)`, where they were given: by its bare name goes the row that has the
    defaults of all of them. What differs between data sets alone, as steps may, names no row. DomainBed's algorithms
    come first, in its order.
    """
    found: dict[str, dict[str, dict[Method, dict[str, str]]]] = {}
    for dataset, method in methods:
        found.setdefault(method.algorithm, {}).setdefault(dataset, {})[method] = dict(method.settings)
    labels: dict[str, dict[Method, str]] = {}
    for algorithm in sorted(found, key=algorithm_order):
        differing = sorted({name for settings in found[algorithm].values() for name in _differing(settings.values())})
        for dataset, settings in found[algorithm].items():
            for method in sorted(settings, key=lambda method: _sort_key(settings[method], differing)):
                own = settings[method]
                shown = [name + "=" + own[name].strip('"') for name in differing if name in own]
                labels.setdefault(dataset, {})[method] = f"{algorithm} ({', '.join(shown)})" if shown else algorithm
    return labels


def _differing(settings: Collection[Mapping[str, str]]) -> list[str]:
    names = {name for values in settings for name in values}
    return [name for name in names if len({values.get(name) for values in settings}) > 1]


def method_of(algorithm: str, hparams: str | dict[str, Any] | None, steps: int | None, dataset: str) -> Method:
    """The row of a run with these arguments. Raises ValueError for hparams that are no JSON object."""
    overrides = json.loads(hparams or "{}") if isinstance(hparams, str) else hparams or {}
    if not isinstance(overrides, dict):
        raise ValueError(overrides)
    settings = {name: json.dumps(value, sort_keys=True) for name, value in overrides.items()}
    if steps is None and dataset in ENVIRONMENTS:
        steps = DEFAULT_STEPS
    if steps is not None:
        settings["steps"] = str(steps)
    return Method(algorithm, tuple(sorted(settings.items())))


def algorithm_order(name: str) -> tuple[int, str]:
    """Sorts algorithms as DomainBed does, and those it does not know behind them by name."""
    return (ALGORITHMS.index(name), "") if name in ALGORITHMS else (len(ALGORITHMS), name)


def _sort_key(settings: dict[str, str], names: list[str]) -> list[tuple[int, float, str]]:
    key = []
    for name in names:
        text = settings.get(name, "")
        try:
            key.append((0, float(text), ""))
        except ValueError:
            key.append((1, 0.0, text))
    return key
