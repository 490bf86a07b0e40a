"""What a sweep should hold, what it holds, and why the rest is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from domainbed_sfp.analysis.methods import Method, alike, label_methods, method_of
from domainbed_sfp.core.domainbed_facts import DEFAULT_STEPS
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.layout import SWEEP
from domainbed_sfp.runs.manifests import jobs_of, read_manifests, several_sweeps
from domainbed_sfp.runs.records import Run, load_failure

# Arguments that two runs of one job must share, beside those which make the job and its method.
_SHARED_ARGS = ("holdout_fraction", "uda_holdout_fraction", "task")


@dataclass(frozen=True, slots=True)
class JobKey:
    """What tells a job of a grid from the others; its run is what a launcher made of it."""

    dataset: str
    method: Method
    test_envs: tuple[int, ...]
    hparams_seed: int
    trial_seed: int


@dataclass(slots=True)
class Account:
    """`runs` are the usable ones, one per job; `missing` gives each other job's reason; `notes` tell what was
    done to the records on the way."""

    runs: dict[JobKey, Run] = field(default_factory=dict)
    missing: dict[JobKey, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def take_account(runs: Sequence[Run], input_dir: str | Path | None, *, include_incomplete: bool) -> Account:
    """Sorts out the runs of a directory: repeated records, incomplete runs, checkpoints before final
    compression.

    The jobs expected are those of every sweep.json that was copied into `input_dir`, else every combination of the
    methods, test environments, trial seeds and hparams seeds seen on a data set. Raises UserError when two directories
    hold the same job under different protocols.
    """
    account = Account()
    root = None if input_dir is None else Path(input_dir)
    manifests = [] if root is None else read_manifests(root)
    entries = [(entry, _method_listed(entry)) for entry in jobs_of(manifests)]
    same = alike([*map(_method_of, runs), *(method for _, method in entries)])
    found = _merge_repeats(runs, same, account.notes)
    expected = _grid(found) if root is None or not manifests else _listed(found, entries, same, root, account.notes)
    if copied := several_sweeps(manifests):
        account.notes.append(copied)
    left_out = dropped = shortened = 0
    for job, run in found.items():
        if not run.complete and not include_incomplete:
            left_out += 1
            account.missing[job] = run.failure or "incomplete"
            continue
        final = run.final.nonzero()[0].tolist()
        if not final:
            account.missing[job] = "has no checkpoint at its final compression"
            continue
        account.runs[job] = run if len(final) == len(run.steps) else run.at(final)
        dropped += len(run.steps) - len(final)
        shortened += len(final) < len(run.steps)
    for job, state in expected.items():
        if job not in found:
            account.missing[job] = state
    incomplete = sum(not run.complete for run in account.runs.values())
    if left_out:
        account.notes.append(f"{_count(left_out, 'incomplete run')} left out (--include_incomplete counts them).")
    if incomplete:
        account.notes.append(f"{_count(incomplete, 'incomplete run')} counted (--include_incomplete).")
    if dropped:
        account.notes.append(
            f"A compressed network is a candidate for selection only at its final compression: "
            f"{_count(dropped, 'earlier checkpoint')} of {_count(shortened, 'run')} left out, which DomainBed counts."
        )
    return account


def row_labels(runs: Sequence[Run]) -> list[str]:
    """The name that each run's row has in the tables."""
    jobs, labels = _labelled(runs)
    return [labels[job.dataset][job.method] for job in jobs]


def rows_of_algorithms(runs: Iterable[Run]) -> dict[tuple[str, str], list[str]]:
    """By data set and algorithm, the names of the rows that its runs have in the tables."""
    rows: dict[tuple[str, str], list[str]] = {}
    for dataset, of_dataset in _labelled(list(runs))[1].items():
        for method, label in of_dataset.items():
            rows.setdefault((dataset, method.algorithm), []).append(label)
    return rows


def _labelled(runs: Sequence[Run]) -> tuple[list[JobKey], dict[str, dict[Method, str]]]:
    """What each run computes, and the names of the rows of each data set."""
    same = alike(map(_method_of, runs))
    jobs = [_job_of(run, same) for run in runs]
    return jobs, label_methods((job.dataset, job.method) for job in jobs)


def explain_missing(
    missing: dict[JobKey, str], labels: dict[Method, str], environments: Sequence[str], limit: int = 12
) -> list[str]:
    """One line per row and reason, with jobs that share test environments, trials and hparams seeds told
    together."""
    grouped: dict[tuple[str, str], dict[tuple[int, ...], set[tuple[int, int]]]] = {}
    for job, reason in missing.items():
        by_envs = grouped.setdefault((labels[job.method], reason), {})
        by_envs.setdefault(job.test_envs, set()).add((job.trial_seed, job.hparams_seed))
    order = {label: position for position, label in enumerate(labels.values())}
    lines: list[str] = []
    told = 0
    for (label, reason), by_envs in sorted(grouped.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        if len(lines) == limit:
            lines.append(f"... and {_count(len(missing) - told, 'more job')}.")
            break
        count = sum(len(seeds) for seeds in by_envs.values())
        told += count
        alike: dict[frozenset[tuple[int, int]], list[tuple[int, ...]]] = {}
        for envs in sorted(by_envs, key=lambda envs: (len(envs), envs)):
            alike.setdefault(frozenset(by_envs[envs]), []).append(envs)
        parts = [
            f"test {', '.join(_environment_set(envs, environments) for envs in sets)} with {_seeds(seeds)}"
            for seeds, sets in alike.items()
        ]
        shown = "; ".join(parts[:4]) + (f"; and {len(parts) - 4} more groups" if len(parts) > 4 else "")
        lines.append(f"{label}: {_count(count, 'job')} missing ({reason}): {shown}.")
    return lines


def steps_of(run: Run) -> int:
    """Training steps: what was asked for, else what a finished run's last record shows (step N-1 of N)."""
    asked: int | None = run.args.get("steps")
    if asked is not None:
        return asked
    return run.steps[-1] + 1 if run.complete else DEFAULT_STEPS


def number_ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _merge_repeats(runs: Sequence[Run], same: Mapping[Method, Method], notes: list[str]) -> dict[JobKey, Run]:
    in_directory: dict[tuple[JobKey, str], list[Run]] = {}
    for run in runs:
        in_directory.setdefault((_job_of(run, same), run.directory), []).append(run)
    found: dict[JobKey, Run] = {}
    repeated: Counter[str] = Counter()
    superseded: list[str] = []
    for (job, directory), stretches in in_directory.items():
        run, dropped = _last_of_each_step(stretches)
        if dropped:
            repeated[directory] += dropped
        if job in found:
            worse, run = _compare(found[job], run)
            superseded.append(f"{worse.directory} for {run.directory}")
        found[job] = run
    if repeated:
        notes.append(
            f"{_count(sum(repeated.values()), 'repeated record')} dropped: of a step recorded more than once "
            f"in a run the last record counts ({_some(sorted(repeated))})."
        )
    if superseded:
        notes.append(
            f"{_count(len(superseded), 'run')} left out, another directory holds the same job ({_some(superseded)})."
        )
    return found


def _last_of_each_step(stretches: list[Run]) -> tuple[Run, int]:
    """One run out of the stretches of a directory, by rising step, and how many records it leaves out."""
    total = sum(len(run.steps) for run in stretches)
    last = stretches[-1]
    if len(stretches) == 1:
        where = {step: at for at, step in enumerate(last.steps)}
        if len(where) == total and last.steps == sorted(last.steps):
            return last, 0
        return last.at([where[step] for step in sorted(where)]), total - len(where)
    alike = [run for run in stretches if run.in_acc.shape[1] == last.in_acc.shape[1]]
    newest = {step: (run, at) for run in alike for at, step in enumerate(run.steps)}
    rows = [newest[step][0].at([newest[step][1]]) for step in sorted(newest)]
    merged = _concatenate(rows, last)
    return merged, total - len(newest)


def _concatenate(rows: list[Run], last: Run) -> Run:
    def cost(run: Run, name: str) -> np.ndarray:
        return run.costs.get(name, np.full(len(run.steps), np.nan))

    names = {name for run in rows for name in run.costs}
    return Run(
        last.directory,
        last.complete,
        last.failure,
        last.args,
        last.hparams,
        last.facts,
        [step for run in rows for step in run.steps],
        np.concatenate([run.in_acc for run in rows]),
        np.concatenate([run.out_acc for run in rows]),
        np.concatenate([run.final for run in rows]),
        {name: np.concatenate([cost(run, name) for run in rows]) for name in names},
    )


def _compare(one: Run, two: Run) -> tuple[Run, Run]:
    """Two directories with the same job: the better is complete, or trained longer, or has the later name."""
    shared = {f"args.{name}": (one.args.get(name), two.args.get(name)) for name in _SHARED_ARGS}
    for name, (first, second) in {**shared, "args.evaluate": (one.evaluate, two.evaluate)}.items():
        if first != second:
            raise UserError(
                f"two different sweeps in one directory: {one.directory} and {two.directory} are the same "
                f"job but for {name} ({first!r} and {second!r}); collect them apart"
            )
    if one.in_acc.shape[1] != two.in_acc.shape[1]:
        raise UserError(
            f"two different sweeps in one directory: {one.directory} and {two.directory} are the same job "
            f"with {one.in_acc.shape[1]} and {two.in_acc.shape[1]} environments; collect them apart"
        )
    worse, better = sorted((one, two), key=lambda run: (run.complete, run.steps[-1], run.directory))
    return worse, better


def _method_of(run: Run) -> Method:
    try:
        return method_of(run.algorithm, run.args.get("hparams"), run.args.get("steps"), run.dataset)
    except ValueError as error:
        raise UserError(
            f"{run.directory}: args.hparams is {run.args.get('hparams')!r}; expected a JSON object"
        ) from error


def _job_of(run: Run, same: Mapping[Method, Method]) -> JobKey:
    test_envs = tuple(sorted(run.test_envs))
    return JobKey(run.dataset, same[_method_of(run)], test_envs, run.hparams_seed, run.trial_seed)


def _grid(found: dict[JobKey, Run]) -> dict[JobKey, str]:
    jobs: list[JobKey] = []
    for dataset in dict.fromkeys(job.dataset for job in found):
        here = [job for job in found if job.dataset == dataset]
        axes = {
            name: sorted({getattr(job, name) for job in here}) for name in ("test_envs", "hparams_seed", "trial_seed")
        }
        jobs += [
            JobKey(dataset, method, test_envs, hparams_seed, trial_seed)
            for method in dict.fromkeys(job.method for job in here)
            for test_envs in axes["test_envs"]
            for trial_seed in axes["trial_seed"]
            for hparams_seed in axes["hparams_seed"]
        ]
    return dict.fromkeys(jobs, "not started")


def _method_listed(entry: dict[str, Any]) -> Method:
    try:
        return method_of(entry["algorithm"], entry.get("hparams"), entry.get("steps"), entry["dataset"])
    except ValueError as error:
        raise UserError(
            f"{SWEEP}: job {entry['name']} has hparams {entry['hparams']!r}; expected a JSON object"
        ) from error


def _listed(
    found: dict[JobKey, Run],
    entries: Sequence[tuple[dict[str, Any], Method]],
    same: Mapping[Method, Method],
    root: Path,
    notes: list[str],
) -> dict[JobKey, str]:
    by_directory = {run.directory: job for job, run in found.items()}
    # A run may record the steps that sweep.json leaves to the data set's default: jobs of one data set
    # that are listed alike share the method that any one of their runs shows.
    shown: dict[tuple[str, Method], Method] = {}
    listed = [(entry, same[method]) for entry, method in entries]
    for entry, method in listed:
        if entry["name"] in by_directory:
            shown[entry["dataset"], method] = by_directory[entry["name"]].method
    expected = {}
    for entry, method in listed:
        seeds = entry["hparams_seed"], entry["trial_seed"]
        method = shown.get((entry["dataset"], method), method)
        job = JobKey(entry["dataset"], method, tuple(sorted(entry["test_envs"])), *seeds)
        directory = root / entry["name"]
        if directory.exists() or job not in expected:
            state = "started, no record yet" if directory.exists() else "not started"
            expected[job] = load_failure(directory) or state
    strangers = sum(job not in expected for job in found)
    if strangers:
        notes.append(f"{_count(strangers, 'run')} counted that {SWEEP} does not list.")
    return expected


def _environment_set(envs: tuple[int, ...], environments: Sequence[str]) -> str:
    return "+".join(environments[env] if env < len(environments) else f"env{env}" for env in envs)


def _seeds(seeds: frozenset[tuple[int, int]]) -> str:
    by_trial: dict[int, set[int]] = {}
    for trial, hparams_seed in seeds:
        by_trial.setdefault(trial, set()).add(hparams_seed)
    alike: dict[frozenset[int], list[int]] = {}
    for trial in sorted(by_trial):
        alike.setdefault(frozenset(by_trial[trial]), []).append(trial)
    return " and ".join(
        f"trial {number_ranges(trials)} x hparams seed {number_ranges(hparams_seeds)}"
        for hparams_seeds, trials in alike.items()
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
