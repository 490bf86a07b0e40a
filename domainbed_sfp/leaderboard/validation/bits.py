"""Bit-widths and bit operations: only of what is quantized, and within what its layers can have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from domainbed_sfp.leaderboard.documents.problems import Problem, counted
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.accuracies import ROUNDING
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of
from domainbed_sfp.leaderboard.validation.networks import Expected
from domainbed_sfp.runs.records import COSTS_OF_IMAGES

OF_BITS = ("bitops", "bitops_8bit", "mean_bits")
# The same for the images of an environment, which tables show before that of all.
_OF_AN_ENVIRONMENT = re.compile(rf"env.*_({'|'.join(OF_BITS)})")


def check_bits(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """A quantized network has its bit operations in every record, of every environment; nothing else has any."""
    expected = bundle.expected.get(run.name)
    if expected is None:
        return
    environments = range(len(run.records[0]["environments"]))
    there = [name for name in OF_BITS if name in expected.measured]
    if expected.code is None:
        there += [f"env{env}_{name}" for env in environments for name in COSTS_OF_IMAGES if name in there]
        there += sorted({name for limits in expected.limits.values() for name in limits} - {*OF_BITS})
    for number, record in enumerate(run.records, start=1):
        for name in sorted({*there, *filter(_is_of_bits, record)}):
            if problem := _wrong(run, record, name, name in there, expected):
                yield Problem(records_of(run), f"line {number}.{name}", problem, counted(record.get(name)))


def _is_of_bits(name: str) -> bool:
    return name in OF_BITS or _OF_AN_ENVIRONMENT.fullmatch(name) is not None


def _wrong(run: BundleRun, record: Mapping[str, Any], name: str, is_there: bool, expected: Expected) -> str | None:
    """What a field of bits must be instead, None where it is right."""
    value, whose = record.get(name), run.run.algorithm
    if value is None:
        return f"a number, as {whose} is quantized" if is_there else None
    if not expected.measured & {*OF_BITS}:
        return f"no such field: {whose} quantizes nothing"
    if not is_there and expected.code is None:
        return "no such field"
    bounds = expected.limits[record["final_compression"]].get(re.sub(r"^env\d+_", "", name))
    if bounds is None:
        return None
    low, high = bounds
    if low * (1 - ROUNDING) <= value <= high * (1 + ROUNDING):
        return None
    span = f"{low:,}" if low == high else f"from {low:,} to {high:,}"
    return f"{span}, by {whose}'s layers"
