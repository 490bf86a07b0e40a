"""What an entry's results say that cannot be: means, errors, citations and costs that contradict each other or the data
set's published facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard.documents.problems import shown
from domainbed_sfp.leaderboard.facts import Facts, facts_of, split_sizes
from domainbed_sfp.leaderboard.rerun.comparing import MEAN_TOLERANCE, TOLERANCE, points_allowed
from domainbed_sfp.leaderboard.rerun.drawing import draw

Told = Iterator[tuple[str, str, str]]
Entry = Mapping[str, Any]
# What every record has.
COUNTED = ("sparsity", "parameters", "surviving_parameters", "dense_macs", "macs")


def check_results(entry: Entry) -> Told:
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


def check_citations(entry: Entry) -> Told:
    """A run is one job's, and one of its checkpoints has one accuracy."""
    jobs: dict[str, tuple[int, int, int]] = {}
    runs: dict[tuple[int, int, int], str] = {}
    accuracies: dict[tuple[str, int], float] = {}
    for place, at, trial in trials_of(entry):
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
        for _, at, trial in trials_of(entry):
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


def check_costs(entry: Entry) -> Told:
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


def trials_of(entry: Entry, *rules: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(field, environment, trial) of every choice, or of those of some rules."""
    for rule in rules or entry["results"]:
        for at, cell in enumerate(entry["results"][rule]["cells"]):
            for number, trial in enumerate(cell["trials"] if cell else ()):
                yield f"results.{rule}.cells[{at}].trials[{number}]", at, trial


def known_facts(entry: Entry) -> Facts | None:
    """What is published of an entry's data set."""
    return None if dataset_class(entry) is None else facts_of(entry["dataset"])


def _in_split(entry: Entry, at: int) -> int | None:
    """Samples on which a test environment's accuracy is measured."""
    facts = known_facts(entry)
    size = facts.sizes[at] if facts and at < len(facts.sizes) else None
    protocol = entry["protocol"]
    if size is None or protocol["task"] != "domain_generalization":
        return None
    return split_sizes(size, True, protocol["holdout_fraction"], 0.0)["in"]


def _smallest_split(entry: Entry) -> int | None:
    """Samples of the smallest split of all environments, where it is known."""
    facts, fraction = known_facts(entry), entry["protocol"]["holdout_fraction"]
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


def dataset_class(entry: Entry) -> type | None:
    """The registered data set of an entry, None where there is none here."""
    try:
        return get_dataset_class(entry["dataset"])
    except UserError:
        return None
