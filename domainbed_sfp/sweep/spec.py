"""What a sweep computes: DomainBed's sweep flags, also as a small YAML file with the same keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import LARGEST, UserError, check_range, did_you_mean, unknown_name
from domainbed_sfp.core.overrides import overrides_text
from domainbed_sfp.core.seeds import seed_hash
from domainbed_sfp.data import dataset_names, get_dataset_class
from domainbed_sfp.data.sets.folders import Folder
from domainbed_sfp.runs.settings import PROTOCOL, check_settings, check_test_envs
from domainbed_sfp.sweep.job import Job
from domainbed_sfp.training import hparams


class _GivenTwice(yaml.YAMLError):
    """A mapping of a spec has a key twice, of which YAML's own readers keep the last."""


class _SpecLoader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a word; in a file of hparams it is a number. A key that is given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if (first := lines.get((key.tag, key.value))) is not None:
                    where = f"line {first}" if line == first else f"lines {first} and {line}"
                    raise _GivenTwice(f"{key.value!r:.80} is given twice ({where}); keep one of them")
                lines[key.tag, key.value] = line
        return node


_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


# A larger grid is a slip of the pen, and its list of jobs fills the memory.
MOST_JOBS = 1_000_000

# The hparams that say how far a network is compressed.
COMPRESSION = ("sparsity", "bits", "target_bitops")


@dataclass(frozen=True)
class SweepSpec:
    """A grid of runs; names and defaults are those of DomainBed's sweep.

    algorithms: names, or mappings {name: NAME, hparams: {...}} for an algorithm with settings of its own; each such
        entry becomes a row of its own in the tables.
    test_envs: the lists of test environments to run, e.g. [[2]]; None takes all single ones and, unless
        `single_test_envs`, all pairs (which leave-one-out selection needs).
    hparams: overrides for all algorithms.
    n_trials_from: the first trial seed, as n_hparams_from is the first draw; DomainBed's sweeps begin at 0. Trials
        that nobody has looked at while choosing anything can be run by themselves.
    """

    datasets: list[str] = field(default_factory=list)
    algorithms: list[str | dict[str, Any]] = field(default_factory=list)
    task: str = "domain_generalization"
    n_hparams_from: int = 0
    n_hparams: int = 20
    n_trials_from: int = 0
    n_trials: int = 3
    steps: int | None = None
    checkpoint_freq: int | None = None
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    single_test_envs: bool = False
    test_envs: list[list[int]] | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    evaluate: str = "all"
    skip_model_save: bool = False

    def updated(self, **changes: Any) -> SweepSpec:
        """A copy with the given fields changed; values that are None change nothing."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


def read_spec(path: str) -> SweepSpec:
    """Reads a spec from a YAML file, or by name one that the package ships.

    Raises UserError, naming file and key, for anything that does not belong there.
    """
    text = _spec_text(path)
    try:
        values = yaml.load(text, _SpecLoader)
    except _GivenTwice as error:
        raise UserError(f"sweep spec {path!r}: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"sweep spec {path!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"sweep spec {path!r}: expected keys such as datasets and algorithms, got {values!r:.80}")
    known = {spec_field.name: spec_field for spec_field in fields(SweepSpec)}
    for key in values:
        if key not in known:
            raise UserError(f"sweep spec {path!r}: {unknown_name('key', key, known)}")
    spec = SweepSpec(**{key: _whole(value) if key in _WHOLE_NUMBERS else value for key, value in values.items()})
    _check_kinds(spec, path)
    return spec


# Keys whose values count something: 300.0 steps are 300.
_WHOLE_NUMBERS = (
    "n_hparams_from", "n_hparams", "n_trials_from", "n_trials", "steps", "checkpoint_freq", "test_envs",
)  # fmt: skip


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_rows(spec: SweepSpec, path: str) -> None:
    """Raises UserError, naming the file `spec` was read from, where a row is of no known algorithm or hparams."""
    try:
        for algorithm, overrides in (_row(entry, spec.hparams) for entry in spec.algorithms):
            for dataset in spec.datasets:
                hparams.resolve_hparams(algorithm, dataset, overrides=overrides)
    except UserError as error:
        raise UserError(f"sweep spec {path!r}: {error}") from error


def shipped_specs() -> list[str]:
    """Names of the specs that come with the package."""
    return sorted(file.stem for file in _specs_folder().glob("*.yaml"))


def _specs_folder() -> Path:
    """An installed package carries the specs inside; in a checkout they are the top-level folder sweeps/."""
    package = Path(__file__).resolve().parents[1]
    return package / "specs" if (package / "specs").is_dir() else package.parent / "sweeps"


def _spec_text(path: str) -> str:
    # A shipped name is that spec, whatever files lie about; a file is named by its path.
    file = _specs_folder() / f"{path}.yaml" if path in shipped_specs() else Path(path)
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"sweep spec {path!r} is not a text file: {error}") from None
    raise UserError(
        f"there is no sweep spec {path!r}: neither a file nor one of {', '.join(shipped_specs())}"
        f"{did_you_mean(path, shipped_specs())}"
    )


def _check_kinds(spec: SweepSpec, path: str) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "datasets": (list,), "algorithms": (list,), "task": (str,), "n_hparams_from": (int,), "n_hparams": (int,),
        "n_trials_from": (int,), "n_trials": (int,), "steps": (int, type(None)), "checkpoint_freq": (int, type(None)),
        "holdout_fraction": (float, int), "uda_holdout_fraction": (float, int), "single_test_envs": (bool,),
        "test_envs": (list, type(None)), "hparams": (dict,), "precision": (str,), "evaluate": (str,),
        "skip_model_save": (bool,),
    }  # fmt: skip
    for name, kind in kinds.items():
        value = getattr(spec, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kind)
            raise UserError(f"sweep spec {path!r}: {name} is {value!r}, expected {expected}")
    for dataset in spec.datasets:
        if not isinstance(dataset, str):
            raise UserError(f"sweep spec {path!r}: datasets holds {dataset!r}, expected names")
    for test_envs in spec.test_envs or []:
        if not isinstance(test_envs, list) or not test_envs or not all(type(env) is int for env in test_envs):
            raise UserError(f"sweep spec {path!r}: test_envs holds {test_envs!r}, expected lists such as [0] or [0, 1]")


def make_jobs(spec: SweepSpec, data_dir: str | None) -> list[Job]:
    """The jobs of a sweep, in DomainBed's order, with DomainBed's seeds.

    Raises UserError for unknown names, hparams that an algorithm does not have, or an empty grid.
    """
    if not spec.datasets or not spec.algorithms:
        missing = "--datasets" if not spec.datasets else "--algorithms"
        raise UserError(f"the sweep names no {missing.strip('-')}; give {missing} or a spec")
    for name in ("n_hparams_from", "n_trials_from"):
        if (first := getattr(spec, name)) < 0:
            raise UserError(f"{name} is {first}, expected 0 or more")
    for name in ("n_hparams", "n_trials"):
        check_range(f"--{name}", getattr(spec, name), -LARGEST)
    if spec.test_envs == [] or spec.n_hparams <= spec.n_hparams_from or spec.n_trials <= spec.n_trials_from:
        raise UserError(
            f"the sweep is empty: n_hparams_from {spec.n_hparams_from}, n_hparams {spec.n_hparams}, n_trials_from "
            f"{spec.n_trials_from}, n_trials {spec.n_trials} (seeds go up to, not including, n_hparams and n_trials), "
            f"test_envs {spec.test_envs}"
        )
    check_settings(spec)
    rows = [_row(entry, spec.hparams) for entry in spec.algorithms]
    _refuse_repeats("datasets", spec.datasets)
    _refuse_repeats("test_envs", [sorted(test_envs) for test_envs in spec.test_envs or []])
    environments = {}
    checked: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for dataset in spec.datasets:
        environments[dataset] = get_dataset_class(dataset).environment_names(data_dir)
        checked[dataset] = []
        for algorithm, overrides in rows:
            hparams.resolve_hparams(algorithm, dataset, overrides=overrides)
            checked[dataset].append((algorithm, hparams.checked_overrides(algorithm, dataset, overrides)))
        _refuse_repeats("algorithms", [_written(*row) for row in checked[dataset]])
    grids = {dataset: list(_all_test_envs(spec, dataset, names)) for dataset, names in environments.items()}
    seeds = (spec.n_trials - spec.n_trials_from) * (spec.n_hparams - spec.n_hparams_from)
    if (count := seeds * len(rows) * sum(len(grids[dataset]) for dataset in spec.datasets)) > MOST_JOBS:
        raise UserError(f"the sweep has {count:,} jobs, expected at most {MOST_JOBS:,}: lower n_hparams or n_trials")
    shared: dict[str, Any] = {name: getattr(spec, name) for name in PROTOCOL}
    jobs = []
    trials = range(spec.n_trials_from, spec.n_trials)
    for trial_seed, dataset, row in product(trials, spec.datasets, range(len(rows))):
        algorithm, overrides = checked[dataset][row]
        for test_envs in grids[dataset]:
            for hparams_seed in range(spec.n_hparams_from, spec.n_hparams):
                jobs.append(
                    Job(
                        dataset=dataset,
                        algorithm=algorithm,
                        hparams=overrides_text(overrides),
                        test_envs=test_envs,
                        hparams_seed=hparams_seed,
                        trial_seed=trial_seed,
                        seed=seed_hash(dataset, algorithm, test_envs, hparams_seed, trial_seed),
                        **shared,
                    )
                )
    return jobs


def _refuse_repeats(key: str, values: Sequence[object]) -> None:
    """Raises UserError for what a list of the sweep holds twice."""
    if repeated := [value for at, value in enumerate(values) if value in values[:at]]:
        raise UserError(f"the sweep names a job twice: {key} holds {repeated[0]} twice")


def _written(algorithm: str, overrides: Mapping[str, Any]) -> str:
    return f"{algorithm} {json.dumps(overrides, sort_keys=True)}" if overrides else algorithm


def drawn_compression(spec: SweepSpec) -> dict[str, list[str]]:
    """The hparams that say how far a network is compressed, where the sweep draws them: the algorithms of whose rows by
    the hparam's name. Such a row mixes networks that are not compressed alike."""
    drawn: dict[str, list[str]] = {}
    if spec.n_hparams <= 1:
        return drawn
    for algorithm, overrides in (_row(entry, spec.hparams) for entry in spec.algorithms):
        table = hparams.hparam_table(algorithm, spec.datasets[0], overrides)
        for name in COMPRESSION:
            if name in table and table[name].sample and name not in overrides:
                drawn.setdefault(name, []).append(algorithm)
    return drawn


def _row(entry: str | Mapping[str, Any], shared: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(algorithm, overrides) of an entry of `algorithms`."""
    if isinstance(entry, str):
        registry.get(entry)
        return entry, dict(shared)
    is_row = isinstance(entry, Mapping) and set(entry) <= {"name", "hparams"} and isinstance(entry.get("name"), str)
    if not is_row or not isinstance(entry.get("hparams", {}), dict):
        raise UserError(f"algorithms: expected a name or {{name: NAME, hparams: {{...}}}}, got {entry!r}")
    registry.get(entry["name"])
    return entry["name"], {**shared, **entry.get("hparams", {})}


def _all_test_envs(spec: SweepSpec, dataset: str, names: list[str]) -> Iterator[list[int]]:
    if spec.test_envs is not None:
        for test_envs in spec.test_envs:
            check_test_envs(dataset, test_envs, names)
            yield list(test_envs)
        return
    n = len(names)
    if n < 3 and not spec.single_test_envs:
        raise UserError(f"{dataset} has {n} environments; pairs of test environments need 3: set single_test_envs")
    for i in range(n):
        yield [i]
        if not spec.single_test_envs:
            for j in range(i + 1, n):
                yield [i, j]


def default_datasets() -> list[str]:
    """DomainBed's default: all data sets but those that are whatever a user has."""
    return [name for name in dataset_names() if not issubclass(get_dataset_class(name), Folder)]
