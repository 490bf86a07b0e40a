"""Paired tests, corrections, the bootstrap and ranks: by hand, by enumeration and against published tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainbed_sfp.analysis.significance import (
    blocks_needed,
    bootstrap_interval,
    friedman_nemenyi,
    holm,
    nemenyi_q,
    paired_test,
    wilcoxon_p,
)

# Whole percents, as small test sets give: ties and zeros occur.
DIFFERENCES = st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=9)


# --- paired tests


def test_the_paired_t_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3), two degrees of freedom, for which Student's
    distribution function is 1/2 + t / (2 sqrt(2 + t^2))."""
    test = paired_test([1.0, 2.0, 3.0])
    assert test.t == pytest.approx(2 * 3**0.5)
    assert test.p_t == pytest.approx(1 - test.t / math.sqrt(2 + test.t**2))
    reach = 0.95 * math.sqrt(2 / (1 - 0.95**2)) / 3**0.5  # the same function, solved for its 97.5 % point
    assert (test.interval.low, test.interval.high) == pytest.approx((2 - reach, 2 + reach))
    assert (test.pairs, test.won, test.tied, test.lost, test.difference) == (3, 3, 0, 0, 2.0)


def enumerated_wilcoxon(differences: list[float]) -> float:
    """Over all signs of the nonzero differences, the share whose smaller rank sum is no larger than the one seen."""
    sizes = [abs(d) for d in differences if d]
    ranks = [sum(s < size for s in sizes) + (sizes.count(size) + 1) / 2 for size in sizes]
    total = sum(ranks)

    def smaller(signs) -> float:
        positive = sum(rank for rank, sign in zip(ranks, signs) if sign)
        return min(positive, total - positive)

    seen = smaller([d > 0 for d in differences if d])
    every = [smaller(signs) for signs in itertools.product([False, True], repeat=len(sizes))]
    return sum(one <= seen for one in every) / len(every)


@given(DIFFERENCES)
@settings(max_examples=60, deadline=None)
def test_wilcoxon_is_the_enumeration_of_all_signs(differences):
    if any(differences):
        assert wilcoxon_p(differences) == pytest.approx(enumerated_wilcoxon(differences))
    else:
        assert wilcoxon_p(differences) is None


def test_wilcoxon_of_a_published_case():
    """1, 2, 3, 4 against -5 (rank sum 5 of 15): ten of 32 signs have a smaller sum of 5 or less on one side."""
    assert wilcoxon_p([1, 2, 3, 4, -5]) == pytest.approx(20 / 32)
    assert wilcoxon_p([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert wilcoxon_p(list(range(1, 201))) == pytest.approx(2.0**-199)  # no overflow where pairs are many


def test_differences_equal_but_for_rounding_are_ties():
    almost = [0.3 - 0.2, 0.2 - 0.1, 0.7 - 0.6]
    assert len(set(almost)) > 1
    test = paired_test(almost)
    assert test.t is None and test.p_t is None and test.interval is None
    assert "all differences are equal: no t-test" in test.remarks[0]


@given(DIFFERENCES, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_other_way_round_and_in_any_order(differences, random):
    test, opposite = paired_test(differences), paired_test([-d for d in differences])
    assert opposite.difference == -test.difference
    assert (opposite.won, opposite.tied, opposite.lost) == (test.lost, test.tied, test.won)
    assert opposite.p_wilcoxon == test.p_wilcoxon and opposite.p_t == test.p_t
    if test.interval:
        assert (opposite.interval.low, opposite.interval.high) == (-test.interval.high, -test.interval.low)
    shuffled = random.sample(differences, len(differences))
    again = paired_test(shuffled)
    assert again.p_t == pytest.approx(test.p_t) and again.p_wilcoxon == pytest.approx(test.p_wilcoxon)
    assert again.difference == pytest.approx(test.difference)


@pytest.mark.parametrize(
    "differences, remarks",
    [
        ([], ["no pairs: a t-test and an interval need two", "no pair with a difference: no Wilcoxon test"]),
        ([3.0], ["1 pair: a t-test and an interval need two", "1 pair with a difference: the smallest p of a Wilcoxon test is 1, it cannot reach 0.05"]),
        ([0.0, 0.0], ["all differences are equal: no t-test, they have no spread to measure their mean by", "no pair with a difference: no Wilcoxon test"]),
        ([1.0, 2.0, 0.0, 3.0, 4.0, 5.0], ["5 pairs with a difference: the smallest p of a Wilcoxon test is 0.0625, it cannot reach 0.05"]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], []),
    ],
)  # fmt: skip
def test_what_too_few_pairs_cannot_say_is_said(differences, remarks):
    assert list(paired_test(differences).remarks) == remarks


# --- Holm


def test_holm_by_hand():
    """.01 x 4, .02 x 3, .03 x 2 (no less than the one before), .04 x 1 (likewise)."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None, 0.02, None, 0.03]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferronis(p_values):
    for p, adjusted in zip(p_values, holm(p_values)):
        assert p <= adjusted <= min(1.0, len(p_values) * p) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert sorted(holm(p_values)) == [holm(p_values)[at] for at in order]


# --- bootstrap


def test_the_bootstrap_against_all_resamples():
    """Strata of two and three values have 4 x 27 equally likely resamples."""
    strata = [[10.0, 20.0], [31.0, 40.0, 52.0]]
    every = sorted(
        (sum(first) / 2 + sum(second) / 3) / 2
        for first in itertools.product(strata[0], repeat=2)
        for second in itertools.product(strata[1], repeat=3)
    )
    interval = bootstrap_interval(strata, resamples=40_000)
    # The 2.5 % point of 108 values is the third, give or take one resample's chance.
    assert every[1] <= interval.low <= every[3] and every[-4] <= interval.high <= every[-2]


def test_the_bootstrap_resamples_trials_and_keeps_environments():
    """Environments that differ widely but whose trials agree leave no uncertainty."""
    interval = bootstrap_interval([[10.0, 10.0], [90.0, 90.0]])
    assert (interval.low, interval.high) == (50.0, 50.0)
    assert bootstrap_interval([[10.0, 20.0], [30.0]]) is None and bootstrap_interval([]) is None


@given(st.permutations([51.0, 57.0, 60.0, 66.0]), st.permutations(range(2)))
@settings(max_examples=20, deadline=None)
def test_the_bootstrap_does_not_hang_on_the_order(values, order):
    strata = [values, [40.0, 45.0]]
    assert bootstrap_interval([strata[at] for at in order]) == bootstrap_interval(
        [[51.0, 57.0, 60.0, 66.0], [40.0, 45.0]]
    )


# --- ranks over data sets

# Demsar 2006, table 6: AUC of C4.5 with and without its parameters m and cf tuned, on 14 data sets. The paper ranks the
# two .975 of `voting` apart, which its rounded table does not show: the first is raised here.
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
)


def test_friedman_and_nemenyi_on_demsars_example():
    ranking = friedman_nemenyi(DEMSAR)
    assert ranking.mean_ranks == pytest.approx((3.143, 2.000, 2.893, 1.964), abs=5e-4)
    # The paper's 9.28 does not correct for ties: three pairs (6 each) and one four (60) of 14 x (4^3 - 4).
    assert ranking.chi_square == pytest.approx(9.28 / (1 - (3 * 6 + 60) / (14 * 60)), abs=0.02)
    assert ranking.critical_difference == pytest.approx(1.25, abs=5e-3)
    # 3.143 - 1.964 < 1.25: one bar over all of them, best first.
    assert ranking.cliques == ((3, 1, 2, 0),)


def test_nemenyis_critical_values_are_demsars_table_5():
    table = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    assert [nemenyi_q(methods) for methods in range(2, 11)] == pytest.approx(table, abs=1.5e-3)


def test_friedman_by_hand():
    """Three blocks that agree on three methods: 12 / (3 x 3 x 4) x (9 + 36 + 81) - 3 x 3 x 4 = 6, and of the 6 x 6
    arrangements of the other two blocks one agrees with the first."""
    ranking = friedman_nemenyi(np.array([[3.0, 2.0, 1.0]] * 3))
    assert ranking.mean_ranks == (1.0, 2.0, 3.0)
    assert ranking.chi_square == pytest.approx(6.0) and ranking.p == pytest.approx(math.exp(-3))
    assert ranking.p_permutation == pytest.approx(1 / 36, abs=0.004)
    assert ranking.critical_difference == pytest.approx(2.343 * math.sqrt(3 * 4 / 18), abs=2e-3)
    assert ranking.cliques == ((0, 1), (1, 2))


def test_methods_that_always_tie_do_not_differ():
    ranking = friedman_nemenyi(np.ones((4, 3)))
    assert (ranking.chi_square, ranking.p, ranking.p_permutation) == (0.0, 1.0, 1.0)
    assert ranking.mean_ranks == (2.0, 2.0, 2.0) and ranking.cliques == ((0, 1, 2),)


@pytest.mark.parametrize("methods", [3, 5, 10, 20])
def test_as_many_data_sets_as_needed_and_not_one_more(methods):
    needed = blocks_needed(methods)

    def difference(blocks: int) -> float:
        return nemenyi_q(methods) * math.sqrt(methods * (methods + 1) / (6 * blocks))

    assert difference(needed) <= methods - 1 < difference(needed - 1)


@pytest.mark.parametrize("shape", [(1, 3), (4, 2)])
def test_too_few_blocks_or_methods(shape):
    with pytest.raises(ValueError, match="expected at least 2 x 3"):
        friedman_nemenyi(np.zeros(shape))
