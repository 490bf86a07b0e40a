"""The hparams behind a cell, best first, as DomainBed's list_top_hparams prints them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from domainbed_sfp.analysis.selection import ORACLE, RULES, Rule, ranked
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.runs.records import Run


def top_hparams_text(runs: Sequence[Run], dataset: str, algorithm: str, test_env: int) -> str:
    """For every rule and trial seed, the hparams of each hparams seed and where its runs were written.

    `runs` must be in the order of os.listdir. Raises UserError when no run has this data set, algorithm and
    test environment, or when runs of one hparams seed differ in their hparams.
    """
    of_dataset = _narrow(runs, "--dataset", dataset, lambda run: run.dataset)
    of_algorithm = _narrow(of_dataset, "--algorithm", algorithm, lambda run: run.algorithm)
    chosen = [run for run in of_algorithm if test_env in run.test_envs]
    if not chosen:
        known = sorted({env for run in of_algorithm for env in run.test_envs})
        raise unknown_name("--test_env", test_env, known)
    by_trial: dict[int, list[Run]] = {}
    for run in chosen:
        by_trial.setdefault(run.trial_seed, []).append(run)

    lines = [f"Total records: {sum(len(run.steps) for run in runs)}"]
    for rule in RULES:
        lines.append(f"Model selection: {rule.title}")
        for trial, of_trial in by_trial.items():
            lines.append(f"trial_seed: {trial}")
            lines += _ranking(rule, of_trial, test_env)
    return "\n".join(lines) + "\n"


def _narrow(runs: Sequence[Run], option: str, wanted: str, value_of: Callable[[Run], str]) -> list[Run]:
    kept = [run for run in runs if value_of(run) == wanted]
    if not kept:
        raise unknown_name(option, wanted, sorted({value_of(run) for run in runs}))
    return kept


def _ranking(rule: Rule, runs: list[Run], test_env: int) -> list[str]:
    lines = []
    for choice, of_seed in ranked(rule, runs, test_env):
        first = of_seed[0]
        for run in of_seed:
            if run.hparams != first.hparams:
                raise UserError(
                    f"{first.directory} and {run.directory} have hparams seed {run.hparams_seed} and "
                    f"trial seed {run.trial_seed} but different hparams; list sweeps apart, or "
                    "use --chosen, which knows rows"
                )
        # Upstream's means are numpy scalars, whose repr says so since numpy 2.
        validation = repr(choice.validation) if rule is ORACLE else f"np.float64({choice.validation!r})"
        lines.append(f"\t{{'val_acc': {validation}, 'test_acc': {choice.test!r}}}")
        lines.append("\t\thparams:")
        lines += [f"\t\t\t{name}: {value}" for name, value in sorted(first.hparams.items())]
        lines.append("\t\toutput_dirs:")
        lines += [f"\t\t\t{path}" for path in dict.fromkeys(run.args["output_dir"] for run in of_seed)]
    return lines
