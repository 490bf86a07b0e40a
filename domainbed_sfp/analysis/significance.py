"""What may be concluded from a few trials: intervals, paired tests, Holm's correction and ranks over data sets.

Everything here works on plain numbers, percent or any other unit. Demsar, "Statistical Comparisons of Classifiers
over Multiple Data Sets", JMLR 7, 2006, is the guide over data sets. scipy is imported inside the functions, because
tables without a comparison should come at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
ALPHA = 0.05
RESAMPLES = 10_000
PERMUTATIONS = 19_999

# Differences that are equal but for the last bits of a float are ties.
_DECIMALS = 9

# The generator's seed: the same records give the same output.
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two-sided tests of differences against zero; `difference` is their mean and `interval` Student's for it.

    None stands where the pairs do not allow a number, and `remarks` say why. `won`, `tied` and `lost` count positive,
    zero and negative differences.
    """

    pairs: int
    won: int
    tied: int
    lost: int
    difference: float | None
    interval: Interval | None
    t: float | None
    p_t: float | None
    p_wilcoxon: float | None
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Friedman's test and Nemenyi's critical difference of mean ranks (rank 1 is the best).

    `chi_square` is corrected for ties, `p` its approximate and `p_permutation` its permutation p-value. `cliques` are
    the largest sets of methods, as indices by rising mean rank, whose ranks span no more than the critical difference.
    """

    blocks: int
    mean_ranks: tuple[float, ...]
    chi_square: float
    p: float
    p_permutation: float
    critical_difference: float
    cliques: tuple[tuple[int, ...], ...]


def bootstrap_interval(strata: Sequence[Sequence[float]], resamples: int = RESAMPLES) -> Interval | None:
    """Percentile interval of the mean over strata of the strata's means; None where a stratum has fewer than two
    values.

    The values are resampled with replacement within each stratum (the trials of an environment); the strata stay as
    they are. Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.
    """
    if not strata or any(len(values) < 2 for values in strata):
        return None
    generator = np.random.default_rng(_SEED)
    means = np.zeros(resamples)
    # Sorted, so that the interval does not hang on the order in which trials were read.
    for values in sorted(sorted(values) for values in strata):
        drawn = generator.integers(len(values), size=(resamples, len(values)))
        means += np.asarray(values)[drawn].mean(axis=1) / len(strata)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Paired t-test and Wilcoxon's signed-rank test of paired differences."""
    from scipy import stats

    values = np.round(np.asarray(differences, dtype=float), _DECIMALS)
    n = len(values)
    won, lost = int((values > 0).sum()), int((values < 0).sum())
    remarks = []
    mean = float(values.mean()) if n else None
    interval = t = p_t = None
    if n < 2:
        remarks.append(f"{pairs_text(n)}: a t-test and an interval need two")
    elif not np.ptp(values):
        remarks.append("all differences are equal: no t-test, they have no spread to measure their mean by")
    else:
        error = float(values.std(ddof=1)) / math.sqrt(n)
        assert mean is not None
        t = mean / error
        p_t = float(2 * stats.t.sf(abs(t), n - 1))
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
        interval = Interval(mean - reach, mean + reach)
    floor = smallest_wilcoxon_p(won + lost)
    if not won + lost:
        remarks.append("no pair with a difference: no Wilcoxon test")
    elif floor > ALPHA:
        remarks.append(
            f"{pairs_text(won + lost)} with a difference: the smallest p of a Wilcoxon test is {floor:.3g}, "
            f"it cannot reach {ALPHA}"
        )
    return PairedTest(n, won, n - won - lost, lost, mean, interval, t, p_t, wilcoxon_p(differences), tuple(remarks))


def pairs_text(number: int) -> str:
    return f"{number or 'no'} pair{'' if number == 1 else 's'}"


def smallest_wilcoxon_p(pairs: int) -> float:
    """The two-sided p of a signed-rank test whose `pairs` nonzero differences all have one sign."""
    return min(1.0, 2.0 ** (1 - pairs))


def wilcoxon_p(differences: Sequence[float]) -> float | None:
    """Two-sided exact p of Wilcoxon's signed-rank test; None without a nonzero difference.

    Zeros are dropped; equal sizes share their mean rank, and the distribution over all 2^n signs is that of the ranks
    as they are (scipy falls back on a normal approximation there, and accuracies on small test sets often tie).
    """
    from scipy import stats

    values = np.round(np.asarray(differences, dtype=float), _DECIMALS)
    values = values[values != 0]
    if not len(values):
        return None
    # Mean ranks are halves: doubled they are whole numbers, and the distribution of their sum a convolution.
    ranks = np.rint(2 * stats.rankdata(np.abs(values))).astype(int)
    total = int(ranks.sum())
    chances = np.zeros(total + 1)
    chances[0] = 1.0
    for rank in ranks:
        chances[rank:] = (chances[rank:] + chances[: total + 1 - rank]) / 2
        chances[:rank] /= 2
    positive = int(ranks[values > 0].sum())
    extreme = min(positive, total - positive)
    return min(1.0, 2 * float(chances[: extreme + 1].sum()))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values in the order given. None (no test) stays None and does not count among the tests.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    tests = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for position, (p, at) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - position) * p))
        adjusted[at] = largest
    return adjusted


def friedman_nemenyi(scores: np.ndarray) -> Ranking:
    """Ranks of methods over blocks (data sets): `scores` has shape (blocks, methods), more is better.

    Needs two blocks and three methods, else ValueError. The permutation p shuffles the scores of each block; of few
    blocks the chi-square distribution is a rough picture. Demsar 2006, section 3.2.2 and figure 1.
    """
    from scipy import stats

    blocks, methods = scores.shape
    if blocks < 2 or methods < 3:
        raise ValueError(f"{blocks} blocks x {methods} methods; expected at least 2 x 3")
    ranks = stats.rankdata(-np.round(scores, _DECIMALS), axis=1)
    mean_ranks = ranks.mean(axis=0)
    if (ranks == ranks[0, 0]).all():
        chi_square, p = 0.0, 1.0  # every method ties with every other: scipy divides by zero
    else:
        chi_square, p = (float(value) for value in stats.friedmanchisquare(*ranks.T))
    difference = nemenyi_q(methods) * math.sqrt(methods * (methods + 1) / (6 * blocks))
    return Ranking(
        blocks,
        tuple(mean_ranks.tolist()),
        chi_square,
        p,
        _friedman_permutation_p(ranks),
        difference,
        _cliques(mean_ranks, difference),
    )


def nemenyi_q(methods: int) -> float:
    """Critical value of Nemenyi's two-tailed test at ALPHA (Demsar 2006, table 5a)."""
    from scipy import stats

    return float(stats.studentized_range.ppf(1 - ALPHA, methods, np.inf)) / math.sqrt(2)


def blocks_needed(methods: int) -> int:
    """The fewest blocks with which the critical difference lets the best and the worst of `methods` differ."""
    return math.ceil(nemenyi_q(methods) ** 2 * methods * (methods + 1) / (6 * (methods - 1) ** 2))


def _friedman_permutation_p(ranks: np.ndarray) -> float:
    """Shares of permutations at least as unequal as the ranks; the ranks themselves count as one."""
    generator = np.random.default_rng(_SEED)
    observed = np.square(ranks.sum(axis=0)).sum()
    as_unequal = 1
    for first in range(0, PERMUTATIONS, 1000):
        count = min(1000, PERMUTATIONS - first)
        shuffled = generator.permuted(np.broadcast_to(ranks, (count, *ranks.shape)), axis=2)
        as_unequal += int((np.square(shuffled.sum(axis=1)).sum(axis=1) >= observed - 1e-9).sum())
    return as_unequal / (PERMUTATIONS + 1)


def _cliques(mean_ranks: np.ndarray, difference: float) -> tuple[tuple[int, ...], ...]:
    order = np.argsort(mean_ranks, kind="stable").tolist()
    found: list[tuple[int, ...]] = []
    last_end = 0
    for start in range(len(order)):
        end = start
        while end < len(order) and mean_ranks[order[end]] - mean_ranks[order[start]] <= difference + 1e-12:
            end += 1
        # One that ends where the one before does lies within it.
        if end - start > 1 and end > last_end:
            found.append(tuple(order[start:end]))
            last_end = end
    return tuple(found)
