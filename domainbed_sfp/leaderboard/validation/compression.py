"""Which records are at final compression, and that the model stays as it is from there on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of
from domainbed_sfp.leaderboard.validation.networks import key_of
from domainbed_sfp.runs.records import SPARSITY_ASKED

# The claimed sparsity is a ratio of counts that hparams and masks give as well.
SPARSITY_ROUNDING = 1e-6

# Of the finished model. Masks of this project's methods no longer change; another's may exchange weights.
OF_THE_MODEL = ("sparsity", "masks", "surviving_parameters", "macs")
# Of the dense network.
OF_THE_NETWORK = ("parameters", "dense_macs", "bitops_8bit")


def check_final_flags(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """Compression is final from the step on that the hparams say; where they do not, from one step on, to the end."""
    expected, flags = bundle.expected.get(run.name), [record["final_compression"] for record in run.records]
    if expected is not None and expected.final_step is not None:
        first = expected.final_step
        words = f"{run.run.algorithm} is at its final compression from step {first:,} on, by its hparams"
    else:
        if not any(flags):
            yield Problem(records_of(run), "final_compression", "true in one record at least", "false in all")
            return
        first = run.records[flags.index(True)]["step"]
        words = f"it was true at step {first:,}, and compression is final once"
    for number, record in enumerate(run.records, start=1):
        if record["final_compression"] != (is_final := record["step"] >= first):
            told = shown(record["final_compression"])
            yield Problem(records_of(run), f"line {number}.final_compression", f"{shown(is_final)}: {words}", told)
            return


def check_same_final_step(bundle: Bundle) -> Iterator[Problem]:
    """Where hparams do not say when compression is final, it is so at the same step in all runs of the same ones."""
    seen: dict[str, tuple[int, BundleRun]] = {}
    for run in bundle.runs:
        expected = bundle.expected.get(run.name)
        if expected is not None and expected.final_step is not None:
            continue
        step = next((record["step"] for record in run.records if record["final_compression"]), -1)
        earlier, other = seen.setdefault(key_of(run), (step, run))
        if step != earlier:
            words = f"true from step {earlier:,} on, as in {records_of(other)} with the same settings"
            yield Problem(records_of(run), "final_compression", words, f"true from step {step:,} on")


def check_model_stays(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """The dense network is the same in all records, and the compressed one in all at final compression; only those name
    masks."""
    expected, finished = bundle.expected.get(run.name), None
    of_the_model = OF_THE_MODEL if expected is not None and expected.code is None else OF_THE_MODEL[:1]
    for number, record in enumerate(run.records, start=1):
        compared = dict.fromkeys(OF_THE_NETWORK, 1)
        if record["final_compression"]:
            finished = finished or number
            compared |= dict.fromkeys(of_the_model, finished)
        elif "masks" in record:
            words = "no such field before final compression"
            yield Problem(records_of(run), f"line {number}.masks", words, shown(record["masks"]))
        for name, line in compared.items():
            if _differ(earlier := run.records[line - 1].get(name), record.get(name)):
                words = f"{shown(earlier)} as in line {line}"
                yield Problem(records_of(run), f"line {number}.{name}", words, shown(record.get(name)))
                return


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) > SPARSITY_ROUNDING
    return one != other


def check_sparsity(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """At final compression the sparsity is what the hparams ask for, and masks are named that have it."""
    expected, asked = bundle.expected.get(run.name), run.run.hparams.get("sparsity")
    if expected is not None and expected.sparsity is not None:
        wanted, tolerance, source = expected.sparsity, SPARSITY_ROUNDING, "by the hparams"
    elif isinstance(asked, (int, float)) and run.run.hparams.get("mask_rule", "top_k") == "top_k":
        wanted, tolerance, source = asked, SPARSITY_ASKED, f"which hparam sparsity asks for (within {SPARSITY_ASKED})"
    else:
        wanted, tolerance, source = 0.0, 1.0, ""
    for number, record in enumerate(run.records, start=1):
        if not record["final_compression"]:
            continue
        if abs(record["sparsity"] - wanted) > tolerance:
            words = f"{wanted:.6g}, {source}, at final compression"
            yield Problem(records_of(run), f"line {number}.sparsity", words, shown(record["sparsity"]))
            return
        if expected is not None and expected.has_masks not in (None, "masks" in record):
            words = f"no such field, because {run.run.algorithm} masks nothing"
            words = "the digest of its masks" if expected.has_masks else words
            told = "nothing" if expected.has_masks else shown(record["masks"])
            yield Problem(records_of(run), f"line {number}.masks", words, told)
            return
