"""The record schema: what a run writes at a checkpoint, and how a directory of runs is read.

A sweep directory holds one subdirectory per run with `results.jsonl`, one JSON record a line and a
checkpoint, and an empty-or-not file `done` once the run has finished; packed.py tells where the records of finished
runs lie once they are packed into one file. The fields are DomainBed's (`step`,
`env{i}_in_acc`, `env{i}_out_acc`, `args`, `hparams`, ...; accuracies are fractions) and, beside them, ours:

    sparsity               fraction of the prunable weights removed
    granularity            "weight" or "channel"
    decisions              what the method has decided where an hparam leaves it open ("auto"), by hparam
    final_compression      whether this checkpoint is compressed as far as the run goes; absent means yes
    masks                  digest of the final masks, the name of their file in the run's folder masks/
    parameters, surviving_parameters, dense_macs, macs
    exported_bytes         size of the tensors that `export` writes: without dead channels, zeros of single weights
                           kept; null for an algorithm that cannot be exported
    bitops, bitops_8bit    of a quantized network for one training image, degraded as they are in training: as
                           deployed, and with 8 bits everywhere
    mean_bits              bit-width of its layers between the first and the classifier, each layer counting alike
    env{i}_bitops, env{i}_mean_bits    the same for the images of an environment; tables show the test environments'
    env{i}_degraded        the finished model on degraded copies of a test environment: see training.evaluate_degraded
    wall_time, images_per_second, precision, environment, commit
    standing               "published", "reconstruction" or "reference"
    environments           the names of the data set's environments
    input_shape            (channels, height, width) of the network's input
    data_digest            of the images, for a data set that its name does not determine; else null
    left_out               how many files and folders beside the data are no part of it, by reason (hidden, empty, ...:
                           data.images.contents.REASONS); absent where there are none
    weights_digest         of the file that hparam `weights` names: a hash; else absent
    code                   of an algorithm of another package: a hash of that package's Python files; else absent
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.runs.layout import CHECKPOINT, DONE, FAILURE, RESULTS, named, no_runs, runs_below
from domainbed_sfp.runs.packed import is_packed, lines_of, places
from domainbed_sfp.runs.record_lines import Lines, last_of, numbered_records

# Fields that may differ between two runs which are bit-identical otherwise.
VOLATILE_FIELDS = frozenset({"step_time", "wall_time", "images_per_second", "mem_gb"})

# What a checkpoint costs, per record; NaN in `Run.costs` where a record does not say.
COST_FIELDS = (
    "sparsity", "parameters", "surviving_parameters", "dense_macs", "macs", "exported_bytes", "bitops", "bitops_8bit",
    "mean_bits",
)  # fmt: skip

# Of those, what may depend on the image: a record says it of every environment too.
COSTS_OF_IMAGES = ("bitops", "mean_bits")

# Said by the last record for the whole run.
FACT_FIELDS = (
    "granularity", "precision", "commit", "standing", "environments", "input_shape", "data_digest", "code",
    "weights_digest",
)  # fmt: skip

# What is further from the sparsity that its hparam asks for is not at its final compression; few channels round.
SPARSITY_ASKED = 0.05

# How data is called whose name says all, where data_digest is null.
PUBLISHED = "published"

Warn = Callable[[str], None]


@dataclass(slots=True)
class Run:
    """Consecutive records of one results.jsonl that share their `args`, by columns.

    `steps` has one entry per checkpoint in file order; `in_acc` and `out_acc` are float64 arrays of shape
    (checkpoints, environments) with fractions in [0, 1]; `final` is a bool array over checkpoints; `costs`
    maps a name of COST_FIELDS to a float array over checkpoints. `failure` tells why the run stopped, where
    it says so.
    """

    directory: str
    complete: bool
    failure: str | None
    args: dict[str, Any]
    hparams: dict[str, Any]
    facts: dict[str, Any]
    steps: list[int]
    in_acc: np.ndarray
    out_acc: np.ndarray
    final: np.ndarray
    costs: dict[str, np.ndarray]

    @property
    def dataset(self) -> str:
        dataset: str = self.args["dataset"]
        return dataset

    @property
    def algorithm(self) -> str:
        algorithm: str = self.args["algorithm"]
        return algorithm

    @property
    def test_envs(self) -> tuple[int, ...]:
        return tuple(self.args["test_envs"])

    @property
    def hparams_seed(self) -> int:
        seed: int = self.args["hparams_seed"]
        return seed

    @property
    def evaluate(self) -> str:
        """Which checkpoints have records: "all", as in DomainBed, or "final", those that selection may choose."""
        evaluate: str = self.args.get("evaluate", "all")
        return evaluate

    @property
    def trial_seed(self) -> int:
        seed: int = self.args["trial_seed"]
        return seed

    def at(self, checkpoints: Sequence[int]) -> Run:
        """The run with only these checkpoints (indices into `steps`), in this order."""
        chosen = np.asarray(checkpoints, dtype=int)
        return Run(
            self.directory,
            self.complete,
            self.failure,
            self.args,
            self.hparams,
            self.facts,
            [self.steps[i] for i in checkpoints],
            self.in_acc[chosen],
            self.out_acc[chosen],
            self.final[chosen],
            {name: values[chosen] for name, values in self.costs.items()},
        )


def write_records(path: str | os.PathLike[str], records: Iterable[dict[str, Any]]) -> None:
    """Writes all records of a run atomically: sorted keys, one JSON object a line, numpy values as plain
    ones."""
    lines = [json.dumps(record, sort_keys=True, default=_plain) + "\n" for record in records]
    write_atomically(path, "".join(lines))


def read_records(directory: Path, warn: Warn) -> Iterator[dict[str, Any]]:
    """The records of a run, in file order, from its folder or as they are packed.

    A last line that is not a whole record (the run was killed while writing it) is skipped and told to `warn`. Raises
    UserError, naming file and line, for a broken line anywhere else; OSError if the file cannot be read.
    """
    for _, record in numbered_records(lines_of(directory), warn):
        yield record


def load_records(input_dir: str | os.PathLike[str], *, warn: Warn, directory_order: bool = False) -> list[Run]:
    """Every run under `input_dir`, complete or not.

    Runs come in the order of their directories' names, or of os.listdir with `directory_order` (DomainBed's,
    which decides its ties). A directory whose args change midway gives one Run for each stretch. Raises
    UserError when there is no directory, no run, or a record that cannot be understood.
    """
    root = Path(input_dir)
    try:
        names = os.listdir(root)
    except OSError as error:
        raise UserError(f"--input_dir {root}: {error.strerror}; expected a directory of runs") from error
    if RESULTS in names:
        what = "a sweep's packed records" if is_packed(root.resolve().name) else "a single run"
        raise UserError(
            f"--input_dir {root} is {what} (it holds {RESULTS}); expected the directory above it, "
            f"{root.resolve().parent}"
        )
    found = places(root, names, warn)
    if not directory_order:
        found.sort(key=itemgetter(0))
    runs: list[Run] = []
    others = []
    for name, where in found:
        try:
            runs.extend(_read_runs(root / name, where, warn))
        except (FileNotFoundError, NotADirectoryError):
            others.append(name)
        except OSError as error:
            warn(f"{where.path} is skipped: {error.strerror}")
    if not runs:
        raise no_runs(root)
    if below := runs_below(root, others):
        warn(f"{root}: {named(below)}, which are left out: copy what such a folder holds into {root} to count them")
    return runs


def last_record(directory: Path) -> dict[str, Any] | None:
    """The last record of a run; None where it has none yet, or its last line is torn: the one definition of whole
    records that everything goes by.

    Raises OSError where there are records that cannot be read.
    """
    try:
        return last_of(lines_of(directory))
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_done(directory: Path) -> bool:
    """Whether the run is finished and its records are whole: a copy that broke off may have `done` without them, and
    packed ones are."""
    try:
        where = lines_of(directory)
        return (where.size > 0 or (directory / DONE).exists()) and last_of(where) is not None
    except OSError:
        return False


def last_step(directory: Path) -> int:
    """The step of the last whole record, of a run that may be writing the next one; -1 where there is none yet."""
    try:
        found = last_record(directory) or list(read_records(directory, lambda message: None))[-1]
        step = found["step"]
    except (OSError, UserError, IndexError, KeyError):
        return -1
    return step if isinstance(step, int) else -1


def run_of(directory: str, parsed: Sequence[dict[str, Any]]) -> Run:
    """The complete run whose records are `parsed`, which share their `args`.

    Raises KeyError, TypeError or ValueError where a field lacks or is of another kind.
    """
    environments = _count_environments(parsed[0])
    _check_args(parsed[0]["args"], environments)
    columns = _Columns(parsed[0]["args"], environments)
    for record in parsed:
        columns.add(record)
    return columns.run(directory, complete=True, failure=None)


def saved_step(directory: str | os.PathLike[str]) -> int:
    """The step that the checkpoint of an unfinished run continues at; 0 where there is none that can be read."""
    try:
        # As checkpoints.read_state does, but without torch.
        with safe_open(Path(directory) / CHECKPOINT, framework="numpy") as file:
            step: int = strict_json.parse(file.metadata()["domainbed_sfp"])["state"]["step"]
            return step
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return 0


def load_failure(directory: str | os.PathLike[str]) -> str | None:
    """Why the run in this directory stopped, from its failure.json; None when it has none that can be
    read."""
    try:
        failure = strict_json.parse((Path(directory) / FAILURE).read_bytes())
        return f"failed at step {failure['step']}: {failure['error']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


class _Columns:
    """Collects the records of one run while they are read."""

    def __init__(self, args: dict[str, Any], environments: int) -> None:
        self.args = args
        self.in_fields = [f"env{i}_in_acc" for i in range(environments)]
        self.out_fields = [f"env{i}_out_acc" for i in range(environments)]
        self.next_field = f"env{environments}_out_acc"
        self.steps: list[int] = []
        self.in_acc: list[float] = []
        self.out_acc: list[float] = []
        self.final: list[bool] = []
        self.costs: dict[str, list[float]] = {name: [] for name in COST_FIELDS}
        self.last: dict[str, Any] = {}

    def add(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if not isinstance(step, int):
            raise ValueError(f"'step' is {step!r}; expected a whole number")
        self.steps.append(step)
        self.in_acc += [record[field] for field in self.in_fields]
        self.out_acc += [record[field] for field in self.out_fields]
        self.final.append(record.get("final_compression", True))
        if "parameters" in record or "sparsity" in record:
            for name, values in self.costs.items():
                values += [np.nan] * (len(self.steps) - 1 - len(values))
                value = self._cost(record, name)
                values.append(np.nan if value is None else value)
        if not isinstance(record.get("hparams") or {}, dict):
            raise ValueError(f"'hparams' is {record['hparams']!r:.80}; expected an object")
        self.last = record

    def _cost(self, record: dict[str, Any], name: str) -> Any:
        """What a record says of a cost; of the images of the test environments, where it tells them apart."""
        if name in COSTS_OF_IMAGES:
            fields = [f"env{env}_{name}" for env in self.args.get("test_envs") or ()]
            if fields and all(record.get(field) is not None for field in fields):
                return sum(record[field] for field in fields) / len(fields)
        return record.get(name)

    def run(self, directory: str, complete: bool, failure: str | None) -> Run:
        count, shape = len(self.steps), (len(self.steps), len(self.in_fields))
        costs = {}
        for name, values in self.costs.items():
            if values:
                costs[name] = np.array(values + [np.nan] * (count - len(values)), dtype=float)
        in_acc = np.array(self.in_acc, dtype=float).reshape(shape)
        out_acc = np.array(self.out_acc, dtype=float).reshape(shape)
        for accuracies, fields in ((in_acc, self.in_fields), (out_acc, self.out_fields)):
            # The negation catches NaN, which null becomes.
            for row, column in np.argwhere(~((accuracies >= 0) & (accuracies <= 1)))[:1]:
                raise ValueError(f"{fields[column]} of step {self.steps[row]} is {accuracies[row, column]}")
        return Run(
            directory,
            complete,
            failure,
            self.args,
            self.last.get("hparams") or {},
            {name: self.last[name] for name in FACT_FIELDS if name in self.last},
            self.steps,
            in_acc,
            out_acc,
            np.array(self.final, dtype=bool),
            costs,
        )


def _read_runs(directory: Path, where: Lines, warn: Warn) -> list[Run]:
    path = where.path
    stretches: list[_Columns] = []
    current: _Columns | None = None
    torn: list[str] = []
    for number, record in numbered_records(where, torn.append):
        try:
            if current is None or record["args"] != current.args or current.next_field in record:
                environments = _count_environments(record)
                _check_args(record["args"], environments)
                current = _Columns(record["args"], environments)
                stretches.append(current)
            current.add(record)
        except KeyError as error:
            raise UserError(f"{path}, line {number}: the record has no field {error.args[0]!r}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    for message in torn:
        warn(message)
    is_ended = where.size > 0 or (directory / DONE).exists()
    complete = is_ended and not torn
    failure = None if complete else load_failure(directory)
    if is_ended and torn:
        failure = "its last record is torn although it is done: launch it again"
    try:
        return [columns.run(directory.name, complete, failure) for columns in stretches]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: an accuracy is no fraction in [0, 1], or a cost no number ({error})") from error


def _count_environments(record: dict[str, Any]) -> int:
    count = 0
    while f"env{count}_out_acc" in record:
        count += 1
    if count == 0:
        raise KeyError("env0_out_acc")
    return count


def _check_args(args: Any, environments: int) -> None:
    if not isinstance(args, dict):
        raise ValueError(f"'args' is {args!r}; expected an object")
    for field, kind in (("dataset", str), ("algorithm", str), ("hparams_seed", int), ("trial_seed", int)):
        if not isinstance(args[field], kind):
            expected = "a name" if kind is str else "a whole number"
            raise ValueError(f"args.{field} is {args[field]!r:.80}; expected {expected}")
    test_envs = args["test_envs"]
    if not isinstance(test_envs, list) or not test_envs:
        raise ValueError(f"args.test_envs is {test_envs!r}; expected a list of environment numbers")
    for env in test_envs:
        if not isinstance(env, int) or not 0 <= env < environments:
            raise ValueError(f"args.test_envs has {env!r}; the record has environments 0 to {environments - 1}")
