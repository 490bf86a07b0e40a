"""The accuracies of a run are such as the splits of its data set can give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.facts import Facts, facts_of, split_sizes
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of

# Fractions are written with all their digits; this much a sum in another order may differ.
ROUNDING = 1e-9

# Standard errors by which the accuracies of a test environment's two random splits may differ: with a million records
# chance does not reach it.
UNSEEN_ERRORS = 6


def check_accuracies(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """Data set, accuracies and epochs fit each other."""
    facts, first, file = facts_of(run.run.dataset), run.records[0], records_of(run)
    if facts is None or None in facts.sizes:
        bundle.cannot(f"accuracies of {run.run.dataset}: the sizes of its environments are not known here")
    if facts is None:
        return
    if tuple(first["environments"]) != facts.environments:
        words = shown(list(facts.environments))
        yield Problem(file, "line 1.environments", words, shown(first["environments"]))
        return
    if (digest := first["data_digest"]) is not None:
        words = f"null, because {run.run.dataset} stands for the published images"
        yield Problem(file, "line 1.data_digest", words, shown(digest))
    for name, value in facts.hparams.items():
        if (given := run.run.hparams.get(name)) != value:
            words = f"{shown(value)}, with which {run.run.dataset} is compared"
            yield Problem(file, f"line 1.hparams.{name}", words, shown(given))
    side = run.run.hparams.get("image_size")
    expected = [facts.channels, side, side]
    if first["input_shape"] != expected:
        yield Problem(file, "line 1.input_shape", shown(expected), shown(first["input_shape"]))
    splits = _splits(run, facts)
    for env, sizes in splits.items():
        if env in run.run.test_envs:
            yield from _unseen(run, env, sizes["in"], sizes["out"])
        yield from _shares(run, env, sizes)
    if splits and None not in facts.sizes:
        yield from _epochs(run, min(sizes["in"] for sizes in splits.values()))
    smallest = min((sizes["in"] for env, sizes in splits.items() if env not in run.run.test_envs), default=None)
    batch = run.run.hparams.get("batch_size")
    if smallest is not None and type(batch) is int and batch > smallest:
        words = f"at most {smallest:,}, the samples of the smallest training environment"
        yield Problem(file, "line 1.hparams.batch_size", words, f"{batch:,}")


def _splits(run: BundleRun, facts: Facts) -> dict[int, Mapping[str, int]]:
    """The sizes of the splits of each environment whose size is known."""
    args = run.run.args
    return {
        env: split_sizes(size, env in args["test_envs"], args["holdout_fraction"], args["uda_holdout_fraction"])
        for env, size in enumerate(facts.sizes)
        if size is not None
    }


def _unseen(run: BundleRun, env: int, n_in: int, n_out: int) -> Iterator[Problem]:
    """Both splits of a test environment are unseen and drawn at random: their accuracies differ by chance alone."""
    for number, record in enumerate(run.records, start=1):
        one, other = (record.get(f"env{env}_{split}_acc") for split in ("in", "out"))
        if not isinstance(one, float) or not isinstance(other, float) or not n_in * n_out:
            continue
        mean = (one * n_in + other * n_out) / (n_in + n_out)
        error = math.sqrt(max(0.0, mean * (1 - mean)) * (1 / n_in + 1 / n_out))
        if abs(one - other) > UNSEEN_ERRORS * error + 1 / n_out:
            words = (
                f"about {other:.4f}, as of the other {n_out:,} unseen samples of the environment (they differ by "
                f"more than {UNSEEN_ERRORS} standard errors)"
            )
            yield Problem(records_of(run), f"line {number}.env{env}_in_acc", words, shown(one))
            return


def _shares(run: BundleRun, env: int, sizes: Mapping[str, int]) -> Iterator[Problem]:
    """Every accuracy is a whole number of samples."""
    for split, count in sizes.items():
        name = f"env{env}_{split}_acc"
        for number, record in enumerate(run.records, start=1):
            where = f"line {number}.{name}"
            if (name in record) != bool(count):
                words = f"an accuracy of {count} samples" if count else "no such field"
                yield Problem(records_of(run), where, words, shown(record.get(name)))
            elif count and not _is_share(record[name], count):
                nearest = round(record[name] * count)
                words = f"a multiple of 1/{count}, such as {nearest / count!r} ({nearest} of {count} samples)"
                yield Problem(records_of(run), where, words, shown(record[name]))


def _is_share(value: float, count: int) -> bool:
    """Whether `value` is k / count for a whole k, as a division gives it."""
    return 0 <= value <= 1 and abs(round(value * count) / count - value) < 1e-12


def _epochs(run: BundleRun, smallest: int) -> Iterator[Problem]:
    """Epochs are counted by the smallest environment."""
    batch = run.run.hparams.get("batch_size")
    if not smallest or type(batch) is not int or not 0 < batch <= 2**53:
        return
    for number, record in enumerate(run.records, start=1):
        epoch = record["step"] / (smallest / batch)
        if not math.isclose(record["epoch"], epoch, rel_tol=ROUNDING):
            yield Problem(records_of(run), f"line {number}.epoch", shown(epoch), shown(record["epoch"]))
