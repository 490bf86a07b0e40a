"""The three selection rules on cases small enough to check by hand, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domainbed_sfp.analysis.selection import LEAVE_ONE_OUT, ORACLE, RULES, TRAINING_DOMAIN, choose, ranked
from domainbed_sfp.runs.records import Run


def run(
    in_acc: list[list[float]],
    out_acc: list[list[float]],
    *,
    test_envs: tuple[int, ...] = (0,),
    hparams_seed: int = 0,
    steps: list[int] | None = None,
) -> Run:
    """Accuracies by checkpoint and environment."""
    return Run(
        directory="run",
        complete=True,
        failure=None,
        args={
            "dataset": "Tiny",
            "algorithm": "ERM",
            "test_envs": list(test_envs),
            "hparams_seed": hparams_seed,
            "trial_seed": 0,
        },
        hparams={},
        facts={},
        steps=list(range(len(in_acc))) if steps is None else steps,
        in_acc=np.array(in_acc),
        out_acc=np.array(out_acc),
        final=np.ones(len(in_acc), dtype=bool),
        costs={},
    )


def test_training_domain_takes_the_best_mean_of_the_other_environments():
    # Environment 0 is the test environment: its own .99 must not count.
    one = run([[0.10, 0, 0], [0.20, 0, 0], [0.30, 0, 0]], [[0.99, 0.5, 0.1], [0.0, 0.4, 0.4], [0.99, 0.1, 0.3]])
    choice = choose(TRAINING_DOMAIN, [one], 0)
    assert choice is not None
    assert (choice.checkpoint, choice.validation, choice.test) == (1, 0.4, 0.20)


def test_training_domain_takes_the_first_checkpoint_of_equals():
    one = run([[0.1, 0], [0.2, 0], [0.3, 0]], [[0, 0.4], [0, 0.5], [0, 0.5]])
    choice = choose(TRAINING_DOMAIN, [one], 0)
    assert choice is not None and choice.checkpoint == 1


@pytest.mark.parametrize("rule", [TRAINING_DOMAIN, ORACLE])
def test_equal_hparams_seeds_go_to_the_largest(rule):
    runs = [run([[0.1 * seed, 0]], [[0.7, 0.7]], hparams_seed=seed) for seed in (2, 5, 3)]
    choice = choose(rule, runs, 0)
    assert choice is not None and choice.run.hparams_seed == 5


def test_oracle_compares_last_checkpoints_by_the_test_environment():
    early = run([[0.9, 0], [0.2, 0]], [[0.9, 0.9], [0.3, 0.9]], hparams_seed=0)
    late = run([[0.1, 0], [0.4, 0]], [[0.1, 0.1], [0.5, 0.1]], hparams_seed=1)
    choice = choose(ORACLE, [early, late], 0)
    assert choice is not None
    assert (choice.run.hparams_seed, choice.checkpoint, choice.validation, choice.test) == (1, 1, 0.5, 0.4)


def test_oracle_goes_by_the_step_not_by_the_line():
    one = run([[0.1, 0], [0.2, 0], [0.3, 0]], [[0, 0]] * 3, steps=[0, 20, 10])
    choice = choose(ORACLE, [one], 0)
    assert choice is not None and choice.test == 0.2


def test_leave_one_out_validates_on_the_left_out_environments_of_the_pairs():
    single = run([[0.10, 0, 0], [0.20, 0, 0]], [[0, 0.9, 0.9], [0, 0.9, 0.9]])
    without_1 = run([[0, 0.5, 0.99], [0, 0.1, 0.99]], [[0, 0, 0]] * 2, test_envs=(0, 1))
    without_2 = run([[0, 0.99, 0.1], [0, 0.99, 0.7]], [[0, 0, 0]] * 2, test_envs=(0, 2))
    choice = choose(LEAVE_ONE_OUT, [single, without_1, without_2], 0)
    assert choice is not None
    assert (choice.checkpoint, choice.test) == (1, 0.20)
    assert choice.validation == pytest.approx(0.4)


def test_leave_one_out_needs_every_pair_and_one_single_run_at_the_step():
    single = run([[0.1, 0, 0], [0.2, 0, 0]], [[0, 0, 0]] * 2)
    without_1 = run([[0, 0.5, 0], [0, 0.9, 0]], [[0, 0, 0]] * 2, test_envs=(0, 1))
    without_2 = run([[0, 0, 0.5]], [[0, 0, 0]], test_envs=(0, 2))
    assert choose(LEAVE_ONE_OUT, [single, without_1], 0) is None
    choice = choose(LEAVE_ONE_OUT, [single, without_1, without_2], 0)
    assert choice is not None and choice.checkpoint == 0  # step 1 lacks a pair
    assert choose(LEAVE_ONE_OUT, [single, single, without_1, without_2], 0) is None


@pytest.mark.parametrize("rule", RULES)
def test_pairs_alone_give_no_choice(rule):
    pair = run([[0.5, 0.5]], [[0.5, 0.5]], test_envs=(0, 1))
    assert choose(rule, [pair], 0) is None
    assert ranked(rule, [], 0) == []


def test_hparams_are_ranked_best_first():
    runs = [run([[0, 0]], [[0, value]], hparams_seed=seed) for seed, value in enumerate([0.3, 0.9, 0.5, 0.9])]
    assert [choice.run.hparams_seed for choice, _ in ranked(TRAINING_DOMAIN, runs, 0)] == [3, 1, 2, 0]


@settings(deadline=None)
@given(
    st.integers(2, 24).flatmap(
        lambda envs: st.lists(st.lists(st.floats(0, 1), min_size=envs, max_size=envs), min_size=1, max_size=5)
    ),
    st.data(),
)
def test_validation_accuracy_is_the_mean_of_the_list_to_the_last_bit(out_acc, data):
    """DomainBed takes np.mean of a list per checkpoint; a different order of summation would flip its
    ties."""
    test_env = data.draw(st.integers(0, len(out_acc[0]) - 1))
    means = [np.mean([value for env, value in enumerate(row) if env != test_env]) for row in out_acc]
    choice = choose(TRAINING_DOMAIN, [run(out_acc, out_acc, test_envs=(test_env,))], test_env)
    assert choice is not None
    assert choice.validation == max(means)
    assert choice.checkpoint == means.index(max(means))


@settings(deadline=None)
@given(
    st.integers(3, 24).flatmap(
        lambda envs: st.lists(st.lists(st.floats(0, 1), min_size=envs, max_size=envs), min_size=1, max_size=4)
    )
)
def test_leave_one_out_mean_is_exact_too(in_acc):
    envs = len(in_acc[0])
    zeros = [[0.0] * envs] * len(in_acc)
    pairs = [run(in_acc, zeros, test_envs=(0, env)) for env in range(1, envs)]
    choice = choose(LEAVE_ONE_OUT, [run(zeros, zeros), *pairs], 0)
    assert choice is not None
    assert choice.validation == max(np.sum(row[1:]) / (envs - 1) for row in in_acc)
