"""Leaderboard entries: one JSON file per method and data set, `<folder>/<dataset>/<Name>.json`.

An entry says what a submission's records show, never what its author claims. Accuracies and standard errors are percent
and unrounded; standard errors are sample ones (ddof = 1) over trials, null with a single trial. The fields:

    format          1
    name            the entry's name, unique on its data set; the file's name is made from it
    dataset         the registered name
    algorithm       the registered name
    settings        hparams the method was given on purpose, name -> value; `name` tells them where rows differ by them
    tier            "self-reported": something could not be checked, such as an algorithm that is not installed: the
                        entry is listed apart and has no rank
                    "records-verified": every number but the `unverified` ones follows from the records, and the records
                        from the protocol
                    "rerun-verified": and cells computed anew agreed with them
    track           "closed" (a fixed backbone, weights, steps, checkpoints and data, and three trials or more: see
                    `tracks`) or "open"
    transductive    true where training saw unlabelled images of the test environment: ranked apart
    standing        "reference", "published" or "reconstruction", as registered
    reference       where the method comes from
    protocol        {environments: [names], test_envs: [[numbers]], steps, checkpoint_freq, backbone, weights,
                    image_size (pixels or null), holdout_fraction, precision, task, hparams_seeds, trial_seeds,
                    data_digest (null but for a data set that its name does not determine)}
    results         selection key ("training-domain", "leave-one-out", "oracle") -> {
                        cells: one per environment, null where it was not tested, else
                            {environment, accuracy, std_err, trials: [{trial_seed, accuracy, validation, hparams_seed,
                             step, run}]}      accuracy and validation in percent; run: the job's folder
                        average: {accuracy, std_err} or null where an environment is missing
                        worst: {environment, accuracy} or null where an environment is missing
                        costs: {sparsity, parameters, surviving_parameters, dense_macs, macs, ...}: means over the
                            selected checkpoints; sparsity is a fraction in the method's own units, MACs are per image}
    unverified      names of costs that the records do not determine (the BitOPs of learned bit-widths): they are what
                    the runs say of themselves, whatever the tier, and are marked wherever they are shown
    rerun           null, or {seed, cells: [{run, agreement: "identical" or "within tolerance", difference}],
                    tolerance}: what was computed anew, `difference` in points of accuracy
    bundle          SHA-256 of the bundle's SHA256SUMS
    date            of the addition, YYYY-MM-DD
    package         the version of domainbed_sfp that made the records, "domainbed_sfp 0.1.0"
    commit          the commit that made them, or null outside a checkout
    notes           sentences for readers
    superseded_by   null for a current entry; the `bundle` of the entry that took its place for one of the history

Nothing is deleted: an entry that is replaced is kept beside the new one as `<Name>.<k>.json`, k = 1, 2, ... by age.
`read_all` returns the current entries; `read_all(folder, history=True)` the others too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from domainbed_sfp.errors import UserError
from domainbed_sfp.files import write_atomically
from domainbed_sfp.leaderboard.plain_files import open_plain
from domainbed_sfp.leaderboard.schema import Problem, parse, problems_of, shown
from domainbed_sfp.records import COST_FIELDS
from domainbed_sfp.registry import STANDINGS

FORMAT = 1
TIERS = ("self-reported", "records-verified", "rerun-verified")
TRACKS = ("closed", "open")
SELECTIONS = ("training-domain", "leave-one-out", "oracle")

# Larger files are no entries.
LARGEST_FILE = 2**22


@dataclass(frozen=True)
class Trial:
    """What one trial contributes to a cell: the choice over its hparams seeds and checkpoints."""

    trial_seed: int
    accuracy: float
    validation: float
    hparams_seed: int
    step: int
    run: str


@dataclass(frozen=True)
class EntryCell:
    """One test environment under one selection rule."""

    environment: str
    accuracy: float
    std_err: float | None
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Result:
    """A method on a data set under one selection rule. `average` and `worst` are None where an environment is
    missing; `worst` names its environment."""

    cells: tuple[EntryCell | None, ...]
    average: tuple[float, float | None] | None
    worst: tuple[str, float] | None
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard; the module's docstring says what the fields mean."""

    name: str
    dataset: str
    algorithm: str
    settings: Mapping[str, Any]
    tier: str
    track: str
    transductive: bool
    standing: str
    reference: str
    protocol: Mapping[str, Any]
    results: Mapping[str, Result]
    unverified: tuple[str, ...]
    rerun: Mapping[str, Any] | None
    bundle: str
    date: str
    package: str
    commit: str | None
    notes: tuple[str, ...] = ()
    superseded_by: str | None = None

    @property
    def file_name(self) -> str:
        """The name of the entry's file."""
        return f"{slug(self.name)}.json"


def slug(name: str) -> str:
    """A name as a file's: "SFP (sparsity=0.7)" as "SFP_sparsity=0.7"."""
    return re.sub("[^A-Za-z0-9.=+-]+", "_", name).strip("_.") or "entry"


def as_json(entry: Entry) -> dict[str, Any]:
    """The entry's JSON document."""
    document = {"format": FORMAT, **asdict(entry)}
    document |= {"notes": list(entry.notes), "unverified": list(entry.unverified)}
    document["results"] = {key: result_as_json(result) for key, result in entry.results.items()}
    return document


def result_as_json(result: Result) -> dict[str, Any]:
    """A result as it stands in an entry, and in a bundle's submission.json."""
    return {
        "cells": [
            None if cell is None else {**asdict(cell), "trials": list(map(asdict, cell.trials))}
            for cell in result.cells
        ],
        "average": None if result.average is None else dict(zip(("accuracy", "std_err"), result.average)),
        "worst": None if result.worst is None else dict(zip(("environment", "accuracy"), result.worst)),
        "costs": dict(result.costs),
    }


def result_from_json(document: Mapping[str, Any]) -> Result:
    """The opposite of `result_as_json`, for a document that RESULT_SCHEMA accepts."""
    average, worst = document["average"], document["worst"]
    return Result(
        tuple(
            None if cell is None else EntryCell(**{**cell, "trials": tuple(Trial(**trial) for trial in cell["trials"])})
            for cell in document["cells"]
        ),
        None if average is None else (average["accuracy"], average["std_err"]),
        None if worst is None else (worst["environment"], worst["accuracy"]),
        document["costs"],
    )


def from_json(document: Any, file: str = "entry") -> Entry:
    """The entry of a JSON document. Raises UserError, naming file and field, where it does not keep the schema."""
    for problem in problems(document, file):
        raise UserError(problem.line())
    fields = {name: value for name, value in document.items() if name != "format"}
    fields |= {"notes": tuple(document["notes"]), "unverified": tuple(document["unverified"])}
    fields["results"] = {key: result_from_json(result) for key, result in document["results"].items()}
    return Entry(**fields)


def problems(document: Any, file: str = "entry") -> Iterator[Problem]:
    """What a JSON document has that an entry must not have: a field that the schema does not allow or, where there is
    none, fields that contradict each other."""
    found = False
    for problem in problems_of(file, document, SCHEMA):
        found = True
        yield problem
    if not found:
        yield from (Problem(file, *told) for told in _contradictions(document))


def _contradictions(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(field, expected, found) where an entry that the schema allows says two things that cannot both be."""
    if entry["tier"] != TIERS[0] and (entry["rerun"] is not None) != (entry["tier"] == TIERS[2]):
        yield "rerun", f"a value with tier {TIERS[2]}, null with {TIERS[1]}", shown(entry["rerun"])
    try:
        date.fromisoformat(entry["date"])
    except ValueError as error:
        yield "date", "a day of the calendar", f"{shown(entry['date'])} ({error})"
    protocol = entry["protocol"]
    names, seeds = protocol["environments"], {"trial_seed": "trial_seeds", "hparams_seed": "hparams_seeds"}
    tested = {env for envs in protocol["test_envs"] for env in envs}
    for rule, result in entry["results"].items():
        where, cells = f"results.{rule}", result["cells"]
        if len(cells) != len(names):
            yield f"{where}.cells", f"{len(names)} of them, one for each environment", str(len(cells))
            continue
        for at, (name, cell) in enumerate(zip(names, cells)):
            if cell is None:
                continue
            here = f"{where}.cells[{at}]"
            if at not in tested:
                yield here, f"null, because protocol.test_envs has no {at}", "a cell"
            if cell["environment"] != name:
                yield f"{here}.environment", f"{shown(name)}, as in protocol.environments", shown(cell["environment"])
            for number, trial in enumerate(cell["trials"]):
                for field, axis in seeds.items():
                    if trial[field] not in protocol[axis]:
                        yield f"{here}.trials[{number}].{field}", f"one of protocol.{axis}", str(trial[field])
                if trial["step"] >= protocol["steps"]:
                    words = f"below {protocol['steps']}, protocol.steps"
                    yield f"{here}.trials[{number}].step", words, str(trial["step"])
            if len({trial["trial_seed"] for trial in cell["trials"]}) < len(cell["trials"]):
                yield f"{here}.trials", "each trial_seed only once", "one twice"
            values = [trial["accuracy"] for trial in cell["trials"]]
            yield from _differing(f"{here}.accuracy", fmean(values), cell["accuracy"], "the mean of its trials")
            std_err = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            yield from _differing(f"{here}.std_err", std_err, cell["std_err"], "of its trials")
        whole = [cell for cell in cells if cell is not None] if None not in cells else []
        average, worst = result["average"], result["worst"]
        mean = fmean(cell["accuracy"] for cell in whole) if whole else None
        given = average and average["accuracy"]
        yield from _differing(f"{where}.average", mean, given, "the mean of all environments")
        lowest = min((cell["accuracy"] for cell in whole), default=None)
        given = worst and worst["accuracy"]
        yield from _differing(f"{where}.worst", lowest, given, "the lowest of all environments")
        lowest_names = [cell["environment"] for cell in whole if cell["accuracy"] == lowest]
        if whole and worst and worst["environment"] not in lowest_names:
            yield f"{where}.worst.environment", " or ".join(map(shown, lowest_names)), shown(worst["environment"])
        for part, dense in (("surviving_parameters", "parameters"), ("macs", "dense_macs")):
            costs = result["costs"]
            if costs.get(part, 0) > costs.get(dense, math.inf):
                yield f"{where}.costs.{part}", f"at most {dense}, {shown(costs[dense])}", shown(costs[part])


def _differing(field: str, expected: float | None, found: float | None, words: str) -> Iterator[tuple[str, str, str]]:
    if expected is None or found is None:
        if expected is not found:
            yield field, "null" if expected is None else f"{expected!r}, {words}", shown(found)
    elif not math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-9):
        yield field, f"{expected!r}, {words}", shown(found)


def read(path: str | Path) -> Entry:
    """One entry. Raises UserError, naming file and field, where it is none."""
    try:
        with open_plain(path) as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise UserError(f"{path}: expected an entry of at most {LARGEST_FILE:,} bytes")
        return from_json(parse(data), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON document ({error})") from error


def read_all(folder: str | Path, history: bool = False) -> list[Entry]:
    """The current entries under `folder`, by data set and name; with `history` the superseded ones too, each after
    the entry that is current. A folder that is not there holds none. Raises UserError, naming file and field, for a
    file that is no entry, or not the one that its place and name say."""
    found = [_at_its_place(path, read(path)) for path in sorted(Path(folder).glob("*/*.json"))]
    kept = [entry for entry in found if history or entry.superseded_by is None]
    return sorted(kept, key=lambda entry: (entry.dataset, entry.name, entry.superseded_by is not None, entry.date))


def _at_its_place(path: Path, entry: Entry) -> Entry:
    if path.parent.name != slug(entry.dataset):
        problem = Problem(str(path), "dataset", f"that of the folder, {shown(path.parent.name)}", shown(entry.dataset))
        raise UserError(problem.line())
    number = path.name.removeprefix(f"{slug(entry.name)}.").removesuffix("json")
    if re.fullmatch(r"(\d+\.)?", number) is None or not path.name.startswith(f"{slug(entry.name)}."):
        raise UserError(Problem(str(path), "name", f"one whose file is {path.name}", shown(entry.name)).line())
    if bool(number) != (entry.superseded_by is not None):
        words = "the bundle that took its place" if number else "null: a file without number is the current entry"
        raise UserError(Problem(str(path), "superseded_by", words, shown(entry.superseded_by)).line())
    return entry


def write(folder: str | Path, entry: Entry, rerun_command: str = "leaderboard add BUNDLE --rerun N") -> Path:
    """Writes an entry as the current one of its name; the one before it is kept as `<Name>.<k>.json`. `rerun_command`
    is told where a rerun would make the difference.

    Raises UserError where the entry of this name is of another algorithm or protocol (it would vanish behind a number
    that cannot be compared with it), of a higher tier, of more draws or trials, or is this very bundle's at the same
    tier; where another entry's name differs in nothing but capitals; and where the folder cannot be written.
    """
    path = Path(folder) / slug(entry.dataset) / entry.file_name
    text = text_of(entry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in sorted(path.parent.glob("*.json")):
            if other.name != path.name and other.name.lower() == path.name.lower():
                raise UserError(
                    f"{path}: {other.name} is there already, and readers cannot tell the names apart; give yours "
                    "another with `submit --name`"
                )
        if path.exists():
            before = read(path)
            _refuse_another(before, entry, path, rerun_command)
            number = 1
            while (kept := path.with_name(f"{path.stem}.{number}.json")).exists():
                number += 1
            write_atomically(kept, text_of(replace(before, superseded_by=entry.bundle)))
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def text_of(entry: Entry) -> str:
    """The entry's file."""
    from_json(document := as_json(entry), entry.name)
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _refuse_another(before: Entry, entry: Entry, path: Path, rerun_command: str) -> None:
    way = f"; `{rerun_command}` computes runs anew and raises it to {TIERS[2]}" if entry.tier == TIERS[1] else ""
    if (before.bundle, before.tier) == (entry.bundle, entry.tier):
        raise UserError(f"{path}: this bundle is there already, at tier {entry.tier}{way}")
    named: dict[str, tuple[Any, Any]] = {
        "name": (before.name, entry.name),
        "algorithm": (before.algorithm, entry.algorithm),
    }
    named["settings"] = (before.settings, entry.settings)
    for field in (
        "steps", "checkpoint_freq", "backbone", "weights", "image_size", "test_envs", "data_digest", "holdout_fraction",
        "task",
    ):  # fmt: skip
        named[f"protocol.{field}"] = (before.protocol[field], entry.protocol[field])
    for field, (there, here) in named.items():
        if there != here:
            raise UserError(
                f"{path}: an entry of this name is there already, with another {field} ({shown(there)} there, "
                f"{shown(here)} here); give yours a name of its own with `submit --name`"
            )
    if TIERS.index(entry.tier) < TIERS.index(before.tier):
        raise UserError(f"{path}: the entry there is {before.tier}, this one only {entry.tier}{way}")
    for field in ("hparams_seeds", "trial_seeds"):
        there, here = len(before.protocol[field]), len(entry.protocol[field])
        if here < there:
            raise UserError(
                f"{path}: the entry there has {there} {field}, this one only {here}; give yours a name of its own with "
                "`submit --name`"
            )


def object_of(properties: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def list_of(items: Any, **options: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **options}


def or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


TEXT = {"type": "string", "minLength": 1, "maxLength": 500}
NAME = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9][A-Za-z0-9 _.,=+()'-]*$",
    "maxLength": 120,
    "description": "letters a to z, digits, spaces and _.,=+()'-, a letter or digit first",
}
SEED = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**53}
PERCENT = {"type": "number", "minimum": 0, "maximum": 100}
FRACTION = {"type": "float", "minimum": 0, "maximum": 1}
SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
RUN_NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]*$", "maxLength": 120}
ENVIRONMENT_NAME = {"type": "string", "minLength": 1, "maxLength": 120}
SEEDS = list_of(SEED, minItems=1, maxItems=1000, uniqueItems=True)
TEST_ENVS = list_of(
    list_of(SEED, minItems=1, maxItems=2, uniqueItems=True), minItems=1, maxItems=1000, uniqueItems=True
)
# Larger numbers than any hparam or cost are, and such as every format can show.
LARGEST = 1e18
SETTINGS = {
    "type": "object",
    "maxProperties": 200,
    "propertyNames": {"maxLength": 120},
    "additionalProperties": {
        "type": ["number", "string", "boolean"],
        "minimum": -LARGEST,
        "maximum": LARGEST,
        "maxLength": 500,
    },
}

TRIAL_SCHEMA = object_of(
    {
        "trial_seed": SEED,
        "accuracy": PERCENT,
        "validation": PERCENT,
        "hparams_seed": SEED,
        "step": COUNT,
        "run": RUN_NAME,
    }
)
CELL_SCHEMA = object_of(
    {
        "environment": ENVIRONMENT_NAME,
        "accuracy": PERCENT,
        "std_err": or_null(PERCENT),
        "trials": list_of(TRIAL_SCHEMA, minItems=1),
    }
)
RESULT_SCHEMA = object_of(
    {
        "cells": list_of(or_null(CELL_SCHEMA), minItems=1),
        "average": or_null(object_of({"accuracy": PERCENT, "std_err": or_null(PERCENT)})),
        "worst": or_null(object_of({"environment": ENVIRONMENT_NAME, "accuracy": PERCENT})),
        "costs": {
            "type": "object",
            "properties": {key: {"type": "number", "minimum": 0, "maximum": LARGEST} for key in COST_FIELDS},
            "additionalProperties": False,
        },
    }
)
RESULTS_SCHEMA = {
    "type": "object",
    "properties": dict.fromkeys(SELECTIONS, RESULT_SCHEMA),
    "additionalProperties": False,
    "minProperties": 1,
}
PROTOCOL_SCHEMA = object_of(
    {
        "environments": list_of(ENVIRONMENT_NAME, minItems=2, maxItems=1000),
        "test_envs": TEST_ENVS,
        "steps": {"type": "integer", "minimum": 1, "maximum": 2**31},
        "checkpoint_freq": {"type": "integer", "minimum": 1, "maximum": 2**31},
        "backbone": TEXT,
        "weights": TEXT,
        "image_size": or_null(COUNT),
        "holdout_fraction": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "precision": {"enum": ["fp32", "bf16"]},
        "task": {"enum": ["domain_generalization", "domain_adaptation"]},
        "hparams_seeds": SEEDS,
        "trial_seeds": SEEDS,
        "data_digest": or_null(TEXT),
    }
)
RERUN_SCHEMA = object_of(
    {
        "seed": SEED,
        "cells": list_of(
            object_of(
                {
                    "run": RUN_NAME,
                    "agreement": {"enum": ["identical", "within tolerance"]},
                    "difference": PERCENT,
                }
            ),
            minItems=1,
        ),
        "tolerance": PERCENT,
    }
)
PACKAGE = {"type": "string", "pattern": r"^domainbed_sfp [0-9A-Za-z.+-]+$", "maxLength": 60}
COMMIT = or_null({"type": "string", "pattern": r"^[0-9a-f]{7,40}(\+changes)?$"})

SCHEMA = object_of(
    {
        "format": {"const": FORMAT},
        "name": NAME,
        "dataset": RUN_NAME,
        "algorithm": NAME,
        "settings": SETTINGS,
        "tier": {"enum": list(TIERS)},
        "track": {"enum": list(TRACKS)},
        "transductive": {"type": "boolean"},
        "standing": {"enum": list(STANDINGS)},
        "reference": TEXT,
        "protocol": PROTOCOL_SCHEMA,
        "results": RESULTS_SCHEMA,
        "unverified": list_of({"enum": list(COST_FIELDS)}, uniqueItems=True),
        "rerun": or_null(RERUN_SCHEMA),
        "bundle": SHA256,
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "package": PACKAGE,
        "commit": COMMIT,
        "notes": list_of(TEXT, maxItems=50),
        "superseded_by": or_null(SHA256),
    }
)
