"""What a bundle says at all: its files are those that it lists, and every document and record has the right form."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from domainbed_sfp.leaderboard.bundle import layout as layout
from domainbed_sfp.leaderboard.bundle import tree
from domainbed_sfp.leaderboard.bundle.layout import RECORDS, SUBMISSION
from domainbed_sfp.leaderboard.documents.bundle_schema import RECORD_SCHEMA, SUBMISSION_SCHEMA
from domainbed_sfp.leaderboard.documents.parsing import parse
from domainbed_sfp.leaderboard.documents.problems import MOST_PROBLEMS, Problem, problems_of, shown
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.context import Bundle
from domainbed_sfp.runs.records import run_of
from domainbed_sfp.runs.settings import is_place

# A bundle of more than this many times the runs of its own grid is not read.
GRID_EXCESS = 2

# Fields that all records of a run share; of the arguments, those that say what is computed.
SHARED = (
    "args", "hparams", "environments", "input_shape", "data_digest", "code", "standing", "precision", "granularity",
    "decisions", "weights_digest",
)  # fmt: skip
# And those that are alike in most records: kept once.
REPEATED = frozenset((*SHARED, "environment"))

Records = list[dict[str, Any]]


def check_sums(bundle: Bundle) -> Iterator[Problem]:
    """SHA256SUMS names every file, with its contents."""
    yield from islice(tree.check_sums(bundle.tree), MOST_PROBLEMS)


def read_submission(bundle: Bundle) -> Iterator[Problem]:
    """submission.json is there and of the right form."""
    if SUBMISSION not in bundle.tree.sums:
        yield Problem(SUBMISSION, "", "what is submitted", "nothing")
        return
    try:
        document = parse(bundle.tree.read(SUBMISSION))
    except ValueError as error:
        yield Problem(SUBMISSION, "", "a JSON document", str(error))
        return
    found = list(problems_of(SUBMISSION, document, SUBMISSION_SCHEMA))
    yield from found
    if not found:
        bundle.claimed = document


def read_records(bundle: Bundle) -> Iterator[Problem]:
    """Every file of records is that of a run."""
    files = bundle.tree.names(RECORDS)
    if bundle.claimed is not None and len(files) > GRID_EXCESS * (runs := _planned(bundle.claimed)):
        words = f"{runs:,} files, one for each run of the protocol's grid"
        yield Problem(RECORDS, "", words, f"{len(files):,}")
        bundle.is_excessive = True
        return
    if not files:
        yield Problem(RECORDS, "", "a file of records for each run", "none")
    left = layout.MOST_VALUES
    for name in files:
        if left < 0:
            bundle.is_whole = False
            return
        run, values = yield from _read_run(bundle, name, left)
        left -= values
        if run is None:
            bundle.is_whole = False
        else:
            bundle.runs.append(run)


def _planned(claimed: Mapping[str, Any]) -> int:
    """How many runs a submission says it has."""
    axes = ("test_envs", "hparams_seeds", "trial_seeds")
    protocols = [one["protocol"] for one in claimed["datasets"].values()]
    return sum(math.prod(len(protocol[axis]) for axis in axes) for protocol in protocols)


def _read_run(bundle: Bundle, file: str, most_values: int) -> Generator[Problem, None, tuple[BundleRun | None, int]]:
    """The run of a file, None where its records cannot be understood; and how many values it holds."""
    parsed, values = yield from _read_lines(bundle, file, most_values)
    if parsed is None:
        return None, values
    found = [*_differing_fields(file, parsed), *_wrong_environments(file, parsed)]
    yield from found
    if found:
        return None, values
    name = file.removeprefix(RECORDS + "/").removesuffix(".jsonl")
    try:
        return BundleRun(name, parsed, run_of(name, [dict(record) for record in parsed])), values
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        yield Problem(file, "", "records of a run", str(error))
        return None, values


def _read_lines(bundle: Bundle, file: str, most_values: int) -> Generator[Problem, None, tuple[Records | None, int]]:
    """The records of a file, None where one of them is none; and how many values they hold."""
    parsed: Records = []
    names: dict[str, str] = {}
    values = told = 0
    is_fit = True
    for number, line in enumerate(bundle.tree.lines(file), start=1):
        where = f"line {number}"
        if told > MOST_PROBLEMS:
            return None, values
        if problem := _bounds(file, number, line):
            yield problem
            return None, values
        try:
            record = parse(line)
        except ValueError as error:
            yield Problem(file, where, "a JSON object", str(error))
            is_fit, told = False, told + 1
            continue
        if found := list(problems_of(file, record, RECORD_SCHEMA, where)):
            yield from found
            is_fit, told = False, told + len(found)
            continue
        record = _compact(record, parsed[0] if parsed else {}, names)
        if len(names) > layout.MOST_NAMES:
            yield Problem(file, where, f"at most {layout.MOST_NAMES:,} names in all records", "more")
            return None, values
        values += _count_new_values(record, parsed[0] if parsed else {})
        parsed.append(record)
        if values > most_values:
            yield Problem(file, where, f"at most {layout.MOST_VALUES:,} values in all records", "more")
            return None, values
    if is_fit and not parsed:
        yield Problem(file, "", "records, one a line", "none")
    return (parsed if is_fit and parsed else None), values


def _bounds(file: str, number: int, line: bytes) -> Problem | None:
    """What is wrong with a line before it is parsed."""
    if number > layout.MOST_RECORDS:
        return Problem(file, "", f"at most {layout.MOST_RECORDS:,} records", "more lines")
    if len(line) > layout.LONGEST_LINE and not line.endswith(b"\n"):
        return Problem(file, f"line {number}", f"at most {layout.LONGEST_LINE:,} bytes", "more")
    if not line.endswith(b"\n"):
        return Problem(file, f"line {number}", "a line that ends", "the end of the file")
    return None


def _differing_fields(file: str, records: Records) -> Iterator[Problem]:
    """Fields of SHARED that are not alike in all records."""
    first = records[0]
    for number, record in enumerate(records, start=1):
        for name in SHARED:
            if _shared(record, name) != _shared(first, name):
                words = f"{shown(first.get(name))} as in line 1"
                yield Problem(file, f"line {number}.{name}", words, shown(record.get(name)))


def _wrong_environments(file: str, records: Records) -> Iterator[Problem]:
    """Accuracies are those of the environments, and the test environments leave one to train on."""
    environments, tested = records[0]["environments"], records[0]["args"]["test_envs"]
    expected = {f"env{i}_{split}_acc" for i in range(len(environments)) for split in ("in", "out")}
    for number, record in enumerate(records, start=1):
        of_uda = {f"env{i}_uda_acc" for i in record["args"]["test_envs"]}
        there = {name for name in record if name.startswith("env") and name.endswith("_acc")}
        for name in sorted(expected - there):
            yield Problem(file, f"line {number}.{name}", "an accuracy", "nothing")
        for name in sorted(there - expected - of_uda):
            yield Problem(file, f"line {number}.{name}", f"no such field for {len(environments)} environments", "one")
    for env in tested:
        if env >= len(environments):
            yield Problem(file, "line 1.args.test_envs", f"numbers below {len(environments)}", str(env))
    if tested != sorted(tested) or len(tested) >= len(environments):
        # [1, 0] beside [0, 1] would be a second draw of the same job.
        yield Problem(file, "line 1.args.test_envs", "rising numbers that leave one to train on", shown(tested))


def _shared(record: Mapping[str, Any], name: str) -> Any:
    """What a field of SHARED must be alike in."""
    if name == "args":
        return {argument: value for argument, value in record["args"].items() if not is_place(argument)}
    return record.get(name)


def _compact(record: Mapping[str, Any], first: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A record in little memory: its names, and what it repeats of the first one, are kept once."""
    shared = REPEATED & set(first)
    return {
        names.setdefault(name, name): first[name] if name in shared and first[name] == value else value
        for name, value in record.items()
    }


def _count_new_values(record: Mapping[str, Any], first: Mapping[str, Any]) -> int:
    """How many values a record holds beside those that it shares with the first one."""
    return sum(
        _count_values(value)
        for name, value in record.items()
        if not (first and name in REPEATED and value is first.get(name))
    )


def _count_values(value: dict[str, Any] | Sequence[Any] | Any) -> int:
    if isinstance(value, (dict, list)):
        return 1 + sum(map(_count_values, value.values() if isinstance(value, dict) else value))
    return 1
