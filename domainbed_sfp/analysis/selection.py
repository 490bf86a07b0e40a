"""DomainBed's three rules for choosing hparams and checkpoint, tie rules included.

A rule looks at the runs of one algorithm on one data set with one test environment and one trial seed, those
with a pair of test environments included (leave-one-domain-out needs them). Gulrajani & Lopez-Paz, "In Search
of Lost Domain Generalization", ICLR 2021, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from domainbed_sfp.runs.records import Run


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint of a run, with the accuracy it was chosen by and its test accuracy (fractions in [0,
    1])."""

    validation: float
    test: float
    run: Run
    checkpoint: int

    @property
    def in_domain(self) -> float:
        """Mean accuracy on the held-out parts of the environments that the run trained on."""
        return float(np.delete(self.run.out_acc[self.checkpoint], self.run.test_envs).mean())


@dataclass(frozen=True, slots=True)
class Rule:
    """`key` is the name on the command line, `title` DomainBed's name. `choose` picks among runs of one hparams seed;
    those with one test environment are candidates. `choose_alike` picks among runs that all have the same test
    environments, however many; None where the rule is not defined for them."""

    key: str
    title: str
    needs_pairs: bool
    choose: Callable[[Sequence[Run], int], Choice | None]
    choose_alike: Callable[[Sequence[Run], int], Choice | None] | None = None


def ranked(rule: Rule, runs: Sequence[Run], test_env: int, are_alike: bool = False) -> list[tuple[Choice, list[Run]]]:
    """The best checkpoint of every hparams seed that has one, with the seed's runs; the best seed first.

    Among equal validation accuracies the largest hparams seed comes first. are_alike: all runs have the same test
    environments.
    """
    pick = rule.choose_alike if are_alike else rule.choose
    if pick is None:
        return []
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.hparams_seed, []).append(run)
    choices = []
    for seed in sorted(by_seed):
        choice = pick(by_seed[seed], test_env)
        if choice is not None:
            choices.append((choice, by_seed[seed]))
    choices.sort(key=lambda pair: -math.inf if math.isnan(pair[0].validation) else pair[0].validation)
    return choices[::-1]


def choose(rule: Rule, runs: Sequence[Run], test_env: int, are_alike: bool = False) -> Choice | None:
    """The sweep's choice over all hparams seeds, or None when no run allows one."""
    choices = ranked(rule, runs, test_env, are_alike)
    return choices[0][0] if choices else None


def _training_domain(runs: Sequence[Run], test_env: int) -> Choice | None:
    return _highest_validation(_singles(runs), test_env)


def _highest_validation(runs: Sequence[Run], test_env: int) -> Choice | None:
    """The highest mean held-out accuracy over the training environments; the first one in file order on a
    tie."""
    best: Choice | None = None
    for run in runs:
        means = np.delete(run.out_acc, run.test_envs, axis=1).mean(axis=1).tolist()
        at = _first_max(means)
        if best is None or means[at] > best.validation:
            best = Choice(means[at], float(run.in_acc[at, test_env]), run, at)
    return best


def _leave_one_out(runs: Sequence[Run], test_env: int) -> Choice | None:
    """The step with the highest mean, over the other environments j, of the accuracy on j of the run that
    left out {test_env, j}. A step counts when it has all those runs and one run on test_env alone."""
    singles: dict[int, list[tuple[Run, int]]] = {}
    for run in _singles(runs):
        for at, step in enumerate(run.steps):
            singles.setdefault(step, []).append((run, at))
    held_out: dict[int, dict[int, float]] = {}
    for run in runs:
        if len(run.test_envs) != 2:
            continue
        (other,) = set(run.test_envs) - {test_env}
        for step, accuracy in zip(run.steps, run.in_acc[:, other].tolist()):
            held_out.setdefault(step, {})[other] = accuracy
    steps, rows = [], []
    for step in sorted(singles):
        if len(singles[step]) == 1:
            environments = singles[step][0][0].in_acc.shape[1]
            others = [env for env in range(environments) if env != test_env]
            accuracies = held_out.get(step, {})
            if all(env in accuracies for env in others):
                steps.append(step)
                rows.append([accuracies[env] for env in others])
    if not rows:
        return None
    means = (np.array(rows).sum(axis=1) / len(rows[0])).tolist()
    best = _first_max(means)
    run, at = singles[steps[best]][0]
    return Choice(means[best], float(run.in_acc[at, test_env]), run, at)


def _oracle(runs: Sequence[Run], test_env: int) -> Choice | None:
    return _last_checkpoint(_singles(runs), test_env)


def _last_checkpoint(runs: Sequence[Run], test_env: int) -> Choice | None:
    """The last checkpoint; hparams are compared by its held-out accuracy on the test environment itself."""
    last: Choice | None = None
    for run in runs:
        for at, step in enumerate(run.steps):
            if last is None or step >= last.run.steps[last.checkpoint]:
                last = Choice(float(run.out_acc[at, test_env]), float(run.in_acc[at, test_env]), run, at)
    return last


def _singles(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if len(run.test_envs) == 1]


def _first_max(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


TRAINING_DOMAIN = Rule(
    "training-domain", "training-domain validation set", False, _training_domain, _highest_validation
)
LEAVE_ONE_OUT = Rule("leave-one-out", "leave-one-domain-out cross-validation", True, _leave_one_out)
ORACLE = Rule("oracle", "test-domain validation set (oracle)", False, _oracle, _last_checkpoint)

# In the order of DomainBed's tables.
RULES = (TRAINING_DOMAIN, LEAVE_ONE_OUT, ORACLE)
