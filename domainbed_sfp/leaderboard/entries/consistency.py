"""What an entry says that cannot be, seen without its bundle: fields that contradict each other, the data set's
published facts, the registered algorithm, or the draw of its rerun.

A check is a generator of (field, expected, found) over one JSON document that the schema allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from statistics import fmean
from typing import Any, cast

import numpy as np

from domainbed_sfp.algorithms import registry
from domainbed_sfp.analysis.protocol import conditions_of
from domainbed_sfp.core.version import __version__
from domainbed_sfp.leaderboard import names, tracks
from domainbed_sfp.leaderboard.documents.entry_schema import AGREEMENTS
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.entries.numbers import (
    Entry,
    Told,
    check_citations,
    check_costs,
    check_results,
    dataset_class,
    known_facts,
    trials_of,
)
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

# How the notes of an entry begin: they are `leaderboard add`'s, and nothing else is said in them.
OPEN_TRACK, NOT_CHECKED = "Open track: ", "Not checked: "
# Longer notes are cut.
MOST_NOTE = 500


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
    facts = known_facts(entry)
    if facts is None:
        if entry["tier"] != SELF_REPORTED:
            yield "tier", f"{SELF_REPORTED}: nothing is known here of {entry['dataset']}", shown(entry["tier"])
        return
    if list(facts.environments) != names:
        yield "protocol.environments", shown(list(facts.environments)), shown(names)
    if protocol["data_digest"] is not None:
        words = f"null, because {entry['dataset']} stands for the published images"
        yield "protocol.data_digest", words, shown(protocol["data_digest"])


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
        runs = {rule: [_run(entry, trial) for _, _, trial in trials_of(entry, rule)] for rule in entry["results"]}
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
    if dataset_class(entry) is None:
        return
    runs: list[Run] = []
    if entry["algorithm"] in registry.names():
        with suppress(Exception):  # told by the check of settings
            runs = [_run(entry, trial) for _, _, trial in trials_of(entry)]
    for reason in tracks.reasons_for_open(entry["dataset"], entry["protocol"], runs):
        if (text := note_of(OPEN_TRACK, reason)) not in reasons:
            yield "notes", shown(text), "no such note"


def note_of(kind: str, what: str) -> str:
    """A note of an entry: why it is on the open track, or what was not checked."""
    return f"{kind}{what}"[: MOST_NOTE - 1] + "."


def _run(entry: Entry, trial: Mapping[str, Any]) -> Run:
    """What is known of the run behind a choice: its arguments, its hparams as drawn, its input."""
    name, dataset, protocol = entry["algorithm"], entry["dataset"], entry["protocol"]
    values = hparams.resolve_hparams(name, dataset, trial["hparams_seed"], trial["trial_seed"], dict(entry["settings"]))
    facts = known_facts(entry)
    side = values.get("image_size")
    known: dict[str, Any] = {name: protocol[name] for name in ("environments", "data_digest", "precision")}
    if facts and isinstance(side, int):
        known["input_shape"] = (facts.channels, side, side)
    args = {"dataset": dataset, "algorithm": name, "evaluate": "all", **protocol}
    none = np.empty((0, len(protocol["environments"])))
    return Run("", True, None, args, values, known, [], none, none, np.empty(0, dtype=bool), {})


CHECKS: tuple[Callable[[Entry], Told], ...] = (
    _tier, _date, _package, _protocol, check_results, check_citations, check_costs, _registered, _track,
)  # fmt: skip
