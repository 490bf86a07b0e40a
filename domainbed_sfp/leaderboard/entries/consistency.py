"""What an entry says that cannot be, seen without its bundle: fields that contradict each other, the data set's
published facts, the registered algorithm, or the draw of its rerun.

A check is a generator of (field, expected, found) over one JSON document that the schema allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from statistics import fmean, stdev
from typing import Any, cast

import numpy as np

from domainbed_sfp.algorithms import registry
from domainbed_sfp.analysis.protocol import conditions_of
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.version import __version__
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard import names, tracks
from domainbed_sfp.leaderboard.documents.entry_schema import AGREEMENTS
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.facts import Facts, facts_of, split_sizes
from domainbed_sfp.leaderboard.rerun.comparing import MEAN_TOLERANCE, TOLERANCE, points_allowed
from domainbed_sfp.leaderboard.rerun.drawing import draw
from domainbed_sfp.leaderboard.summary import is_transductive, wrong_name
from domainbed_sfp.leaderboard.tiers import (
    MODEL_VERIFIED,
    RECORDS_VERIFIED,
    RERUN_IDENTICAL,
    RERUN_VERIFIED,
    SELF_REPORTED,
)
from domainbed_sfp.runs.records import SPARSITY_ASKED, Run
from domainbed_sfp.training import hparams

Told = Iterator[tuple[str, str, str]]
Entry = Mapping[str, Any]

# How the notes of an entry begin: they are `leaderboard add`'s, and nothing else is said in them.
OPEN_TRACK, NOT_CHECKED = "Open track: ", "Not checked: "
# Longer notes are cut.
MOST_NOTE = 500
# What every record has.
COUNTED = ("sparsity", "parameters", "surviving_parameters", "dense_macs", "macs")


def problems(document: Entry, file: str) -> Iterator[Problem]:
    """The contradictions of an entry that keeps the schema."""
    for check in CHECKS:
        yield from (Problem(file, *told) for told in check(document))


def _tier(entry: Entry) -> Told:
    tier, again = entry["tier"], entry["rerun"]
    of_rerun = (RERUN_VERIFIED, RERUN_IDENTICAL)
    if tier != SELF_REPORTED and (again is not None) != (tier in of_rerun):
        yield "rerun", f"a value with tier {' or '.join(of_rerun)}, null with {tier}", shown(again)
    elif again is not None and tier in of_rerun:
        same = all(cell["agreement"] == AGREEMENTS[0] for cell in again["cells"])
        if same != (tier == RERUN_IDENTICAL):
            yield "tier", RERUN_IDENTICAL if same else RERUN_VERIFIED, shown(tier)
        for at, cell in enumerate(again["cells"]):
            parts = cell["difference"], cell["selected_difference"]
            if parts[1] > parts[0] or (cell["agreement"] == AGREEMENTS[0] and any(parts)):
                words = "0 where identical, and no less than selected_difference"
                yield f"rerun.cells[{at}].difference", words, shown(parts[0])
        if same and again["mean_difference"]:
            yield "rerun.mean_difference", "0 where all are identical", shown(again["mean_difference"])
    if (entry["models"] is None and tier == MODEL_VERIFIED) or (entry["models"] and tier == RECORDS_VERIFIED):
        yield "models", f"a value with tier {MODEL_VERIFIED}, null with {RECORDS_VERIFIED}", shown(entry["models"])
    is_unchecked = any(note.startswith(NOT_CHECKED) for note in entry["notes"])
    if is_unchecked != (tier == SELF_REPORTED):
        words = f'a note "{NOT_CHECKED}..." with tier {SELF_REPORTED}, and with no other'
        yield "notes", words, f"{tier} {'with' if is_unchecked else 'without'} one"


def _date(entry: Entry) -> Told:
    try:
        day = datetime.strptime(entry["date"], "%Y-%m-%d").replace(tzinfo=timezone.utc)
    except ValueError as error:
        yield "date", "a day of the calendar", f"{shown(entry['date'])} ({error})"
        return
    if day > datetime.now(timezone.utc) + timedelta(days=1):
        yield "date", "a day that has come", shown(entry["date"])


def _package(entry: Entry) -> Told:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split("+")[0].split(".") if part.isdigit()]

    version = entry["package"].split(" ")[1]
    if numbers(version) > numbers(__version__):
        yield "package", f"at most domainbed_sfp {__version__}, which reads it", shown(entry["package"])


def _protocol(entry: Entry) -> Told:
    protocol = entry["protocol"]
    for axis in ("hparams_seeds", "trial_seeds"):
        if protocol[axis] != list(range(len(protocol[axis]))):
            yield f"protocol.{axis}", f"{shown(list(range(len(protocol[axis]))))}: all from 0 on", shown(protocol[axis])
    names, test_envs = protocol["environments"], protocol["test_envs"]
    if len(set(names)) < len(names):
        yield "protocol.environments", "each name only once", shown(names)
    if any(sorted(envs) != envs or envs[-1] >= len(names) for envs in test_envs):
        yield "protocol.test_envs", f"rising numbers below {len(names)}", shown(test_envs)
    facts = _facts(entry)
    if facts is None:
        if entry["tier"] != SELF_REPORTED:
            yield "tier", f"{SELF_REPORTED}: nothing is known here of {entry['dataset']}", shown(entry["tier"])
        return
    if list(facts.environments) != names:
        yield "protocol.environments", shown(list(facts.environments)), shown(names)
    if protocol["data_digest"] is not None:
        words = f"null, because {entry['dataset']} stands for the published images"
        yield "protocol.data_digest", words, shown(protocol["data_digest"])


def _results(entry: Entry) -> Told:
    pairs = any(len(envs) == 2 for envs in entry["protocol"]["test_envs"])
    wanted = {"training-domain", "oracle", *(["leave-one-out"] if pairs else [])}
    if set(entry["results"]) != wanted:
        yield "results", ", ".join(sorted(wanted)), ", ".join(sorted(entry["results"]))
    names = entry["protocol"]["environments"]
    for rule, result in entry["results"].items():
        if len(result["cells"]) != len(names):
            where = f"results.{rule}.cells"
            yield where, f"{len(names)} of them, one for each environment", str(len(result["cells"]))
            continue
        for at, cell in enumerate(result["cells"]):
            yield from _cell(entry, rule, at, cell)
        yield from _averages(f"results.{rule}", result)


def _cell(entry: Entry, rule: str, at: int, cell: Mapping[str, Any] | None) -> Told:
    protocol, here = entry["protocol"], f"results.{rule}.cells[{at}]"
    if (cell is None) != ([at] not in protocol["test_envs"]):
        words = f"null, because protocol.test_envs has no {at}" if cell else f"a cell: protocol.test_envs has {at}"
        yield here, words, "a cell" if cell else "null"
    if cell is None:
        return
    name = protocol["environments"][at]
    if cell["environment"] != name:
        yield f"{here}.environment", f"{shown(name)}, as in protocol.environments", shown(cell["environment"])
    seeds = [trial["trial_seed"] for trial in cell["trials"]]
    if seeds != protocol["trial_seeds"]:
        yield f"{here}.trials", f"one for each of protocol.trial_seeds, {shown(protocol['trial_seeds'])}", shown(seeds)
    size = _in_split(entry, at)
    steps, every = protocol["steps"], protocol["checkpoint_freq"]
    for number, trial in enumerate(cell["trials"]):
        place = f"{here}.trials[{number}]"
        if trial["hparams_seed"] not in protocol["hparams_seeds"]:
            yield f"{place}.hparams_seed", "one of protocol.hparams_seeds", str(trial["hparams_seed"])
        if trial["step"] >= steps or (trial["step"] % every and trial["step"] != steps - 1):
            words = f"below {steps}, protocol.steps, and a checkpoint: every {every} steps and the last"
            yield f"{place}.step", words, str(trial["step"])
        if size and abs(round(trial["accuracy"] * size / 100) / size - trial["accuracy"] / 100) > 1e-9:
            nearest = round(trial["accuracy"] * size / 100)
            words = f"a multiple of 100/{size}, such as {100 * nearest / size!r} ({nearest} of {size} samples)"
            yield f"{place}.accuracy", words, shown(trial["accuracy"])
    values = [trial["accuracy"] for trial in cell["trials"]]
    yield from _differing(f"{here}.accuracy", fmean(values), cell["accuracy"], "the mean of its trials")
    yield from _differing(f"{here}.std_err", _std_err(values), cell["std_err"], "of its trials")


def _averages(where: str, result: Mapping[str, Any]) -> Told:
    cells, average, worst = result["cells"], result["average"], result["worst"]
    whole = [cell for cell in cells if cell is not None] if None not in cells else []
    mean = fmean(cell["accuracy"] for cell in whole) if whole else None
    yield from _differing(f"{where}.average", mean, average and average["accuracy"], "the mean of all environments")
    if whole and average:
        trials = zip(*([trial["accuracy"] for trial in cell["trials"]] for cell in whole))
        error = _std_err([fmean(trial) for trial in trials])
        words = "of the trials' averages"
        yield from _differing(f"{where}.average.std_err", error, average["std_err"], words)
    lowest = min((cell["accuracy"] for cell in whole), default=None)
    yield from _differing(f"{where}.worst", lowest, worst and worst["accuracy"], "the lowest of all environments")
    names = [cell["environment"] for cell in whole if cell["accuracy"] == lowest]
    if whole and worst and worst["environment"] not in names:
        yield f"{where}.worst.environment", " or ".join(map(shown, names)), shown(worst["environment"])


def _citations(entry: Entry) -> Told:
    """A run is one job's, and one of its checkpoints has one accuracy."""
    jobs: dict[str, tuple[int, int, int]] = {}
    runs: dict[tuple[int, int, int], str] = {}
    accuracies: dict[tuple[str, int], float] = {}
    for place, at, trial in _trials(entry):
        job = (at, trial["trial_seed"], trial["hparams_seed"])
        if jobs.setdefault(trial["run"], job) != job or runs.setdefault(job, trial["run"]) != trial["run"]:
            yield f"{place}.run", "one run for each test environment, trial and hparams seed", shown(trial["run"])
        known = accuracies.setdefault((trial["run"], trial["step"]), trial["accuracy"])
        words = f"as the same checkpoint of {trial['run']} has elsewhere"
        yield from _differing(f"{place}.accuracy", known, trial["accuracy"], words)
    chosen: dict[frozenset[tuple[str, int]], Mapping[str, float]] = {}
    for rule, result in entry["results"].items():
        key = frozenset((t["run"], t["step"]) for cell in result["cells"] if cell for t in cell["trials"])
        if chosen.setdefault(key, result["costs"]) != result["costs"]:
            yield f"results.{rule}.costs", "those of the other rule that chose the same checkpoints", "others"
    planned = math.prod(len(entry["protocol"][axis]) for axis in ("test_envs", "hparams_seeds", "trial_seeds"))
    if len(entry["runs"]) > planned:
        yield "runs", f"at most {planned}, the runs of the protocol", str(len(entry["runs"]))
    again, step_0, models = entry["rerun"], entry["step_0"], entry["models"]
    if step_0 and step_0["runs"] != planned:
        yield "step_0.runs", f"{planned}, the runs of the protocol", str(step_0["runs"])
    if models and models["checkpoints"] != len(accuracies):
        yield "models.checkpoints", f"{len(accuracies)}, those that are selected", str(models["checkpoints"])
    if again:
        cited: dict[str, set[str]] = {}
        for _, at, trial in _trials(entry):
            cited.setdefault(entry["protocol"]["environments"][at], set()).add(trial["run"])
        drawn = sorted(draw(cited, again["per_environment"], entry["bundle"], again["seed"]))
        if (found := sorted(cell["run"] for cell in again["cells"])) != drawn:
            words = f"{shown(drawn)}, which bundle and seed {again['seed']} draw"
            yield "rerun.cells", words, shown(found)
        if abs(again["mean_difference"]) > MEAN_TOLERANCE:
            yield "rerun.mean_difference", f"at most {MEAN_TOLERANCE:g} points", shown(again["mean_difference"])
        if again["tolerance"] > TOLERANCE:
            yield "rerun.tolerance", f"at most {TOLERANCE:g} points", shown(again["tolerance"])
        limit = points_allowed(again["tolerance"], _smallest_split(entry))
        for at, cell in enumerate(again["cells"]):
            if cell["difference"] > limit:
                yield f"rerun.cells[{at}].difference", f"at most {limit:.3g}", shown(cell["difference"])


def _costs(entry: Entry) -> Told:
    for rule, result in entry["results"].items():
        costs, where = result["costs"], f"results.{rule}.costs"
        for name in COUNTED:
            if name not in costs:
                yield f"{where}.{name}", "a number: every record has it", "nothing"
        for part, dense in (("surviving_parameters", "parameters"), ("macs", "dense_macs")):
            left, whole = costs.get(part, 0), costs.get(dense, math.inf)
            if left > whole:
                yield f"{where}.{part}", f"at most {dense}, {shown(costs[dense])}", shown(left)
        if "sparsity" in costs and "surviving_parameters" in costs and "parameters" in costs:
            is_dense = costs["surviving_parameters"] == costs["parameters"]
            if is_dense != (costs["sparsity"] == 0):
                words = "0 where all parameters survive, and no 0 where they do not"
                yield f"{where}.sparsity", words, shown(costs["sparsity"])
        if costs.get("sparsity", 0) > 1:
            yield f"{where}.sparsity", "a fraction of at most 1", shown(costs["sparsity"])
    if missing := sorted(
        set(entry["unverified"]) - {name for one in entry["results"].values() for name in one["costs"]}
    ):
        yield "unverified", "costs of the results", shown(missing)


def _registered(entry: Entry) -> Told:
    """What follows from the registered algorithm, where it is installed here."""
    if (name := entry["algorithm"]) not in registry.names():
        settings = {key: [value] for key, value in {**entry["protocol"], **entry["settings"]}.items()}
        if wrong := names.wrong_name(entry["name"], name, registry.names(), settings):
            yield ("name", *wrong)
        return
    info, task = registry.get(name), entry["protocol"]["task"]
    expected = {
        "standing": info.standing,
        "reference": info.reference,
        "transductive": is_transductive(info, task),
    }
    for field, value in expected.items():
        if entry[field] != value:
            yield field, f"{shown(value)}, as of {name} with task {task}", shown(entry[field])
    try:
        runs = {rule: [_run(entry, trial) for _, _, trial in _trials(entry, rule)] for rule in entry["results"]}
    except Exception as error:  # a stranger's settings can be anything
        yield "settings", f"hparams of {name}, in their ranges", str(error)
        return
    if wrong := wrong_name(entry["name"], [run for some in runs.values() for run in some]):
        yield ("name", *wrong)
    for rule, some in runs.items():
        asked = [run.hparams.get("sparsity") for run in some if run.hparams.get("mask_rule", "top_k") == "top_k"]
        sparsity = entry["results"][rule]["costs"].get("sparsity")
        if sparsity is not None and asked and all(isinstance(one, float) for one in asked):
            mean = fmean(cast(list[float], asked))
            if abs(sparsity - mean) > SPARSITY_ASKED:
                words = f"{mean:g}, which hparam sparsity asks for (within {SPARSITY_ASKED})"
                yield f"results.{rule}.costs.sparsity", words, shown(sparsity)
        for run in some:
            conditions = conditions_of(run)
            for field in ("backbone", "weights", "image_size"):
                value, found = getattr(conditions, field), entry["protocol"][field]
                # A file's hash is in the records alone.
                if value is not None and value != str(found).partition(" (hash ")[0] and value != found:
                    yield f"protocol.{field}", f"{shown(value)}, by settings and data set", shown(found)


def _track(entry: Entry) -> Told:
    reasons = [note for note in entry["notes"] if note.startswith(OPEN_TRACK)]
    for at, note in enumerate(entry["notes"]):
        if not note.startswith((OPEN_TRACK, NOT_CHECKED)):
            yield f"notes[{at}]", f'a note that begins "{OPEN_TRACK}" or "{NOT_CHECKED}"', shown(note)
    if bool(reasons) != (entry["track"] == "open"):
        words = f'a note "{OPEN_TRACK}..." for each reason on the open track, none on the closed one'
        yield "track", words, f"{entry['track']} with {len(reasons)}"
    if _class(entry) is None:
        return
    runs: list[Run] = []
    if entry["algorithm"] in registry.names():
        with suppress(Exception):  # told by the check of settings
            runs = [_run(entry, trial) for _, _, trial in _trials(entry)]
    for reason in tracks.reasons_for_open(entry["dataset"], entry["protocol"], runs):
        if (text := note_of(OPEN_TRACK, reason)) not in reasons:
            yield "notes", shown(text), "no such note"


def note_of(kind: str, what: str) -> str:
    """A note of an entry: why it is on the open track, or what was not checked."""
    return f"{kind}{what}"[: MOST_NOTE - 1] + "."


def _trials(entry: Entry, *rules: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(field, environment, trial) of every choice, or of those of some rules."""
    for rule in rules or entry["results"]:
        for at, cell in enumerate(entry["results"][rule]["cells"]):
            for number, trial in enumerate(cell["trials"] if cell else ()):
                yield f"results.{rule}.cells[{at}].trials[{number}]", at, trial


def _run(entry: Entry, trial: Mapping[str, Any]) -> Run:
    """What is known of the run behind a choice: its arguments, its hparams as drawn, its input."""
    name, dataset, protocol = entry["algorithm"], entry["dataset"], entry["protocol"]
    values = hparams.resolve_hparams(name, dataset, trial["hparams_seed"], trial["trial_seed"], dict(entry["settings"]))
    facts = _facts(entry)
    side = values.get("image_size")
    known: dict[str, Any] = {name: protocol[name] for name in ("environments", "data_digest", "precision")}
    if facts and isinstance(side, int):
        known["input_shape"] = (facts.channels, side, side)
    args = {"dataset": dataset, "algorithm": name, "evaluate": "all", **protocol}
    none = np.empty((0, len(protocol["environments"])))
    return Run("", True, None, args, values, known, [], none, none, np.empty(0, dtype=bool), {})


def _class(entry: Entry) -> type | None:
    try:
        return get_dataset_class(entry["dataset"])
    except UserError:
        return None


def _facts(entry: Entry) -> Facts | None:
    return None if _class(entry) is None else facts_of(entry["dataset"])


def _in_split(entry: Entry, at: int) -> int | None:
    """Samples on which a test environment's accuracy is measured."""
    facts = _facts(entry)
    size = facts.sizes[at] if facts and at < len(facts.sizes) else None
    protocol = entry["protocol"]
    if size is None or protocol["task"] != "domain_generalization":
        return None
    return split_sizes(size, True, protocol["holdout_fraction"], 0.0)["in"]


def _smallest_split(entry: Entry) -> int | None:
    """Samples of the smallest split of all environments, where it is known."""
    facts, fraction = _facts(entry), entry["protocol"]["holdout_fraction"]
    known = [size for size in facts.sizes if size is not None] if facts else []
    splits = (split_sizes(size, False, fraction, 0.0) for size in known)
    return min((count for split in splits for count in split.values() if count), default=None)


def _std_err(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _differing(field: str, expected: float | None, found: float | None, words: str) -> Told:
    if expected is None or found is None:
        if expected is not found:
            yield field, "null" if expected is None else f"{expected!r}, {words}", shown(found)
    elif not math.isclose(expected, found, rel_tol=1e-9, abs_tol=1e-9):
        yield field, f"{expected!r}, {words}", shown(found)


CHECKS: tuple[Callable[[Entry], Told], ...] = (
    _tier, _date, _package, _protocol, _results, _citations, _costs, _registered, _track,
)  # fmt: skip
