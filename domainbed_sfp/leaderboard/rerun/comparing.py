"""Two computations of one run, record by record and field by field.

Where machine, versions and commit are the same, both are the same bit by bit or one of them is not what it says. On
another machine sums come in another order: the first step differs by a few samples, later ones by what training makes
of that. Tolerances are from honest runs computed with other convolution routines: at most .21 points at step 0 and 2.5
at the end, .26 in the signed mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any

from domainbed_sfp.leaderboard.bundle.layout import RECORDS
from domainbed_sfp.leaderboard.documents.bundle_schema import RECORD_SCHEMA
from domainbed_sfp.leaderboard.documents.entry_schema import AGREEMENTS
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.validation.outcomes import Recomputed
from domainbed_sfp.runs.records import VOLATILE_FIELDS

Record = Mapping[str, Any]

# Points of accuracy by which a record may differ on another machine: of step 0, and of any other.
FIRST_TOLERANCE = 1.0
TOLERANCE = 3.0
# Of a small split so many samples may differ: one can be more than a point.
SAMPLES = 2
# In the mean over all records but the first, where the noise of single ones is gone and what was added to all is not.
MEAN_TOLERANCE = 1.0

# What says where a record was made, and how long it took.
PLACE = ("environment", "commit", "code")
# Files beside the data are as many as a copy of it happens to have. What was asked for is checked before anything is
# computed (`validation.settings`), and versions differ in what they name of it.
_APART = {*VOLATILE_FIELDS, *PLACE, "args", "hparams", "decisions", "left_out"}
# What training decides: a channel more or less. The rest of a record's own fields is the same anywhere.
_SIZES = re.compile(r"surviving_parameters|macs|exported_bytes|(env\d+_)?(bitops|mean_bits)")
_SIZE_TOLERANCE = 0.05
_SPARSITY_TOLERANCE = 0.02
_ACCURACY = re.compile(r"env(\d+)_(in|out|uda)_acc")
_DEGRADED = re.compile(r"env\d+_degraded")
# Samples of a degraded copy are few.
_DEGRADED_TOLERANCE = 10.0
# Of a model whose widths depend on the image.
_OF_IMAGES = re.compile(r"env\d+_(bitops|mean_bits)")
_OF_IMAGES_TOLERANCE = 0.01
# Losses and penalties: their size, not their value.
_MEASURED_FACTOR, _MEASURED_FLOOR = 3.0, 0.1


def compare(
    name: str,
    claimed: Sequence[Record],
    again: Sequence[Record],
    tolerance: float,
    selected: frozenset[int],
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> Recomputed:
    """Compares the records of a run with those of its second computation.

    Args:
        name: the run's.
        claimed: its records in the bundle; `again` as many of them, from the first on.
        tolerance: points of accuracy, of all records but the first.
        selected: steps that a selection rule chose.
        sizes: of the splits, by the names of their accuracies, where they are known.
    """
    outcome, file = Recomputed(name), f"{RECORDS}/{name}.jsonl"
    pairs = list(zip(claimed, again))
    theirs, ours = (one[0].get("code") for one in (claimed, again))
    if theirs and ours and theirs != ours:
        words = f"{ours}, the hash of the algorithm's package here: install the version that made the records"
        outcome.problems.append(Problem(file, "line 1.code", words, shown(theirs)))
        return outcome
    if (steps := [record["step"] for record in claimed]) != (found := [record["step"] for record in again]):
        outcome.problems.append(Problem(file, "step", f"{shown(found)}, as computed again", shown(steps)))
        return outcome
    exact = list(_differing(file, pairs, _same))
    if not exact:
        return outcome
    if all(_is_same_place(old, new) for old, new in pairs):
        words = ", as computed again with the same versions on the same kind of machine"
        outcome.problems = [Problem(file, where, expected + words, told) for where, expected, told in exact]
        return outcome
    outcome.agreement = AGREEMENTS[1]
    rules = _Elsewhere(tolerance, sizes)
    words = ", as computed again on another machine or commit"
    outcome.problems = [
        Problem(file, where, expected + words, told) for where, expected, told in _differing(file, pairs, rules.allows)
    ]
    _collect(outcome, pairs, selected)
    return outcome


def check_means(comparisons: Sequence[Recomputed], tolerance: float) -> tuple[float, Iterator[Problem]]:
    """The signed mean difference of accuracies on unseen environments over all runs, in points, and what is wrong with
    it, or with that of validation splits or selected records: points added to every record, each within its tolerance,
    show here."""
    found: dict[str, list[float]] = {}
    for one in comparisons:
        for kind, values in one.signed.items():
            found.setdefault(kind, []).extend(values)
    runs = sum(bool(one.signed) for one in comparisons)
    # The mean of single records, one a run or so, may be off by more than that of all; the less, the more runs.
    limits = dict.fromkeys(found, MEAN_TOLERANCE) | {SELECTED: max(MEAN_TOLERANCE, tolerance / math.sqrt(runs or 1))}
    problems = (
        Problem(RECORDS, f"accuracies, {kind}", f"a mean within {limits[kind]:.2f} points of that computed again",
                f"{fmean(values):+.2f} points over {len(values)} of them")
        for kind, values in found.items()
        if abs(fmean(values)) > limits[kind]
    )  # fmt: skip
    return fmean(found[UNSEEN]) if found.get(UNSEEN) else 0.0, problems


def compare_model(
    name: str, number: int, claimed: Record, again: Record, sizes: Mapping[str, int] = MappingProxyType({})
) -> Recomputed:
    """Compares a record, the `number`th of run `name`, with the evaluation of its model: what follows from the model's
    state is the same anywhere; accuracies differ by a few samples, and what is measured of images by rounding."""
    outcome = Recomputed(name)
    for field_name in sorted({*again, "masks"} - _APART):
        old, new = claimed.get(field_name), plain(again.get(field_name))
        if _same(field_name, claimed["step"], old, new):
            continue
        if (match := _ACCURACY.fullmatch(field_name)) and old is not None and new is not None:
            outcome.difference = max(outcome.difference, 100 * abs(old - new))
            is_alike = 100 * abs(old - new) <= points_allowed(FIRST_TOLERANCE, sizes.get(field_name))
        elif _DEGRADED.fullmatch(field_name):
            is_alike = old is not None and new is not None and _alike_copies(old, new)
        else:
            is_number = isinstance(old, (int, float)) and isinstance(new, (int, float))
            is_alike = bool(_OF_IMAGES.fullmatch(field_name)) and is_number
            is_alike = is_alike and math.isclose(old, new, rel_tol=_OF_IMAGES_TOLERANCE)  # type: ignore[arg-type]
        if not is_alike:
            words = f"{shown(new)}, of the model in the bundle" + (" on the data" if match else "")
            outcome.problems.append(
                Problem(f"{RECORDS}/{name}.jsonl", f"line {number}.{field_name}", words, shown(old))
            )
    return outcome


UNSEEN, VALIDATION, SELECTED = "unseen environments", "validation splits", "selected records"


def _collect(outcome: Recomputed, pairs: Sequence[tuple[Record, Record]], selected: frozenset[int]) -> None:
    for old, new in pairs:
        is_selected = old["step"] in selected
        for name in old:
            match = _ACCURACY.fullmatch(name)
            if match is None or new.get(name) is None:
                continue
            signed = 100 * (old[name] - new[name])
            outcome.difference = max(outcome.difference, abs(signed))
            is_unseen = int(match[1]) in old["args"]["test_envs"]
            if is_selected:
                outcome.selected_difference = max(outcome.selected_difference, abs(signed))
            if old["step"] == 0:
                continue
            if is_unseen:
                outcome.signed.setdefault(UNSEEN, []).append(signed)
                if is_selected and match[2] == "in":
                    outcome.signed.setdefault(SELECTED, []).append(signed)
            elif match[2] == "out":
                outcome.signed.setdefault(VALIDATION, []).append(signed)


def _is_same_place(old: Record, new: Record) -> bool:
    """Whether both were made with the same versions on the same kind of machine. What `+changes` were, nobody knows."""
    changed = str(old.get("commit") or "").endswith("+changes")
    return not changed and all(old.get(name) == new.get(name) for name in PLACE)


def _differing(
    file: str, pairs: Sequence[tuple[Record, Record]], is_alike: Callable[[str, int, Any, Any], bool]
) -> Iterator[tuple[str, str, str]]:
    """(field, expected, found) of every field of every record that is not alike, those that only one has included."""
    for number, (old, new) in enumerate(pairs, start=1):
        for name in sorted({*old, *new} - _APART):
            where = f"line {number}.{name}"
            if name not in new:
                yield where, "no such field", shown(old[name])
            elif name not in old:
                yield where, shown(plain(new[name])), "nothing"
            elif not is_alike(name, old["step"], old[name], plain(new[name])):
                yield where, shown(plain(new[name])), shown(old[name])


def _same(name: str, step: int, old: Any, new: Any) -> bool:
    return old == new and isinstance(old, bool) == isinstance(new, bool)


@dataclass(frozen=True)
class _Elsewhere:
    """What may differ, and by how much, between two machines."""

    tolerance: float
    sizes: Mapping[str, int]

    def allows(self, name: str, step: int, old: Any, new: Any) -> bool:
        if _same(name, step, old, new):
            return True
        if old is None or new is None:
            return False
        if _ACCURACY.fullmatch(name):
            points = self.tolerance if step else min(FIRST_TOLERANCE, self.tolerance)
            return 100 * abs(old - new) <= points_allowed(points, self.sizes.get(name))
        if _DEGRADED.fullmatch(name):
            return _alike_copies(old, new)
        if name == "sparsity":
            return abs(old - new) <= _SPARSITY_TOLERANCE
        if _SIZES.fullmatch(name):
            return abs(old - new) <= _SIZE_TOLERANCE * max(abs(old), abs(new))
        # Two sets of masks of about the same size: `macs` and `surviving_parameters` compare them.
        return name == "masks" or (name not in RECORD_SCHEMA["properties"] and _alike_numbers(old, new))


def points_allowed(tolerance: float, size: int | None) -> float:
    """Points by which the accuracy of a split may differ."""
    return max(tolerance, 100 * SAMPLES / size if size and tolerance else 0.0) + 1e-9


def _alike_numbers(old: float, new: float) -> bool:
    small, large = sorted((abs(old), abs(new)))
    return abs(old - new) <= _MEASURED_FLOOR or (old * new > 0 and large <= _MEASURED_FACTOR * small)


def _alike_copies(old: Sequence[Record], new: Sequence[Record]) -> bool:
    """Evaluations on degraded copies: the same copies, accuracies within the noise of few samples."""
    if len(old) != len(new) or any(one.keys() != other.keys() for one, other in zip(old, new)):
        return False
    exact = ("degradation", "severity", "samples")
    return all(
        all(one[name] == other[name] for name in exact)
        and 100 * abs(one["accuracy"] - other["accuracy"]) <= _DEGRADED_TOLERANCE
        for one, other in zip(old, new)
    )


def plain(value: Any) -> Any:
    """A value as a bundle has it: null for what is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
