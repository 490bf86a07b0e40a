"""The submission that is claimed is the one that the records give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from domainbed_sfp.analysis.selection import ORACLE
from domainbed_sfp.leaderboard import summary
from domainbed_sfp.leaderboard.bundle.layout import RECORDS, SUBMISSION
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.validation.accuracies import ROUNDING
from domainbed_sfp.leaderboard.validation.context import Bundle

_NOTHING = object()

# Accuracies, best of a run's final checkpoints on the test environment: by data set, environment and trial.
Best = Mapping[tuple[str, int, int], float]


def check_submission(bundle: Bundle) -> Iterator[Problem]:
    """Protocol, selection, means, errors and costs are recomputed and compared with the claim."""
    if not bundle.is_fit:
        return
    claimed = bundle.claimed
    bundle.document = summary.document_of(claimed["name"] if claimed else "submission", bundle.runs, claimed)
    if claimed is not None:
        yield from _differing(bundle, bundle.document, claimed)
        if wrong := summary.wrong_name(claimed["name"], [one.run for one in bundle.runs]):
            yield Problem(SUBMISSION, "name", *wrong)
    if len(codes := {run.records[0].get("code") for run in bundle.runs}) > 1:
        yield Problem(RECORDS, "code", "one version of the algorithm's package in all runs", f"{len(codes)}")


def differences(expected: Any, found: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any, Any]]:
    """Where two JSON values differ: (path, expected, found); numbers may differ by ROUNDING."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name in {**expected, **found}:
            yield from differences(expected.get(name, _NOTHING), found.get(name, _NOTHING), (*path, name))
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found)):
            yield from differences(one, other, (*path, index))
    else:
        is_float = type(expected) is type(found) is float
        same = math.isclose(expected, found, rel_tol=ROUNDING, abs_tol=ROUNDING) if is_float else expected == found
        if not same or type(expected) is not type(found):
            yield path, expected, found


def _differing(bundle: Bundle, document: Mapping[str, Any], claimed: Mapping[str, Any]) -> Iterator[Problem]:
    best = _best_on_the_test_environment(bundle)
    for path, expected, found in differences(document, claimed):
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        words = shown(expected) if expected is not _NOTHING else "no such field"
        told = shown(found) if found is not _NOTHING else "nothing"
        if path[0] == "datasets" and len(path) > 4 and path[2] == "results":
            words += ", from the records"
            told += _peeking(path, claimed, best)
        yield Problem(SUBMISSION, where, words, told)


def _best_on_the_test_environment(bundle: Bundle) -> Best:
    best: dict[tuple[str, int, int], float] = {}
    for run in bundle.runs:
        if len(run.run.test_envs) == 1:
            key = (run.run.dataset, run.run.test_envs[0], run.run.trial_seed)
            final = [100 * record[f"env{key[1]}_in_acc"] for record in run.records if record["final_compression"]]
            best[key] = max([best.get(key, 0.0), *final])
    return best


def _peeking(path: tuple[str | int, ...], claimed: Mapping[str, Any], best: Best) -> str:
    """What to add where a claimed choice is the best on the test environment, under a rule that must not look there."""
    dataset, rule = str(path[1]), path[3]
    if rule == ORACLE.key or "trials" not in path or path[4] != "cells" or not isinstance(path[5], int):
        return ""
    cell = claimed["datasets"][dataset]["results"][rule]["cells"][path[5]]
    at = path[path.index("trials") + 1] if path.index("trials") + 1 < len(path) else None
    if cell is None or not isinstance(at, int) or at >= len(cell["trials"]):
        return ""
    trial = cell["trials"][at]
    highest = best.get((dataset, path[5], trial["trial_seed"]))
    if highest is None or abs(trial["accuracy"] - highest) > ROUNDING:
        return ""
    return f" (chosen by the highest accuracy on the test environment, which {rule} selection must not see)"
