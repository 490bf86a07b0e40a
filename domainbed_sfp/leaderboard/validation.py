"""Whether a bundle's numbers follow from its records, and its records from the protocol.

Everything is recomputed: sums, grid, seeds, hparams drawn, steps, what accuracies the splits allow, masks, selection,
means and errors. Each deviation becomes a `Problem`; one does not hide the next. What records alone cannot show is
whether they were computed as they say: `rerun` is for that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from domainbed_sfp import hparams, networks, registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.analysis.selection import ORACLE
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.errors import UserError
from domainbed_sfp.leaderboard import bundle, costs, mask_headers, summary, tracks
from domainbed_sfp.leaderboard.bundle import MASKS, RECORDS, SUBMISSION, Tree
from domainbed_sfp.leaderboard.entries import TIERS
from domainbed_sfp.leaderboard.facts import facts_of, split_sizes
from domainbed_sfp.leaderboard.rerun import Rerun
from domainbed_sfp.leaderboard.schema import MOST_PROBLEMS, Problem, parse, printable, problems_of, shown
from domainbed_sfp.leaderboard.summary import SubmittedRun
from domainbed_sfp.pruning import accounting, mask_files
from domainbed_sfp.records import COST_FIELDS, RESULTS, SPARSITY_ASKED, run_of
from domainbed_sfp.seeds import seed_hash
from domainbed_sfp.training import SURROUNDINGS

# Fractions are written with all their digits; this much a sum in another order may differ.
ROUNDING = 1e-9
# The claimed sparsity is a ratio of counts that the masks give as well.
SPARSITY_ROUNDING = 1e-6

# So many problems of a bundle are told: past them the list would be the largest thing in memory.
MOST_TOLD = 50 * MOST_PROBLEMS
# A bundle of more than this many times the runs of its own grid is not read.
GRID_EXCESS = 2

# Standard errors by which the accuracies of a test environment's two random splits may differ: with a million records
# chance does not reach it.
UNSEEN_ERRORS = 6

# Fields that all records of a run share; of the arguments, those that say what is computed.
SHARED = (
    "args", "hparams", "environments", "input_shape", "data_digest", "code", "standing", "precision", "granularity",
)  # fmt: skip
# And those that are alike in most records: kept once.
REPEATED = frozenset((*SHARED, "environment"))


@dataclass
class Validation:
    """The outcome. problems: what must be mended. unchecked: what could not be checked here. unverified: by data set,
    the costs that the records do not determine. submission: the document as recomputed from the records, None where
    they are not fit for it; sums: SHA-256 of SHA256SUMS. rerun: None where nothing was to be computed anew."""

    root: Path
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    unverified: dict[str, list[str]] = field(default_factory=dict)
    submission: dict[str, Any] | None = None
    runs: list[SubmittedRun] = field(default_factory=list)
    sums: str = ""
    rerun: Rerun | None = None

    @property
    def tier(self) -> str | None:
        """None for a bundle with problems; else "self-reported" where a number could not be checked, or
        "records-verified", or "rerun-verified" where a run of every data set was computed anew and agreed."""
        if self.problems or self.submission is None:
            return None
        return min(map(self.tier_of, self.submission["datasets"]), key=TIERS.index)

    def tier_of(self, dataset: str) -> str:
        """The tier of one data set of a bundle without problems."""
        if self.unchecked:
            return TIERS[0]
        return TIERS[1] if self.rerun_of(dataset) is None else TIERS[2]

    def rerun_of(self, dataset: str) -> dict[str, Any] | None:
        """What was computed anew of a data set, as an entry tells it; None where nothing was."""
        names = {one.name for one in self.runs if one.run.dataset == dataset}
        return None if self.rerun is None else self.rerun.document(names)

    def reasons_for_open(self, dataset: str) -> list[str]:
        """Why the submission is not of the closed track on a data set; empty where it is."""
        if self.submission is None:
            raise ValueError("a bundle that cannot be read has no track")
        runs = [one.run for one in self.runs if one.run.dataset == dataset]
        return list(tracks.reasons_for_open(dataset, self.submission["datasets"][dataset]["protocol"], runs))


def validate(folder: str | Path) -> Validation:
    """Checks a bundle. Raises UserError where there is no folder to check."""
    root = Path(folder)
    if root.is_symlink() or not root.is_dir():
        what = "a symbolic link; give what it points to" if root.is_symlink() else "no folder"
        what += "; unpack it first" if root.is_file() and not root.is_symlink() else ""
        raise UserError(f"bundle {str(folder)!r} is {what}: expected the folder made by `domainbed-sfp submit`")
    if not (root / SUBMISSION).exists() and next(root.glob(f"*/{RESULTS}"), None):
        raise UserError(
            f"bundle {str(folder)!r} is a sweep's folder; `domainbed-sfp submit --input_dir {folder}` makes a bundle "
            "of one of its rows"
        )
    try:
        tree = bundle.read_tree(root)
        return _Check(root, tree).complete()
    except OSError as error:
        raise UserError(f"bundle {str(folder)!r} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Network:
    """A run's algorithm as it begins, how often each of its weights is used, the parameters and costs of `predict`."""

    algorithm: Algorithm
    positions: Mapping[str, int]
    deployed: Mapping[str, torch.Tensor]
    costs: Mapping[str, float]


class _Check:
    """One bundle while it is being checked."""

    def __init__(self, root: Path, tree: Tree) -> None:
        self.tree = tree
        self.outcome = Validation(root, list(tree.problems), sums=tree.sums.get(bundle.SUMS, ""))
        # Runs whose fields have the right form, and all that are there at all.
        self.is_whole = True
        self.values = 0
        # By data set: costs of the results that every chosen checkpoint's network gives as well.
        self.recomputed: dict[str, set[str]] = {}

    def complete(self) -> Validation:
        outcome = self.outcome
        if self.tree.is_refused:
            return outcome
        self._add(bundle.check_sums(self.tree))
        claimed = self._claimed()
        files = len(self.tree.names(RECORDS))
        if claimed is not None and files > GRID_EXCESS * (runs := _planned(claimed)):
            self._problem(RECORDS, "", f"{runs:,} files, one for each run of the protocol's grid", f"{files:,}")
            return outcome
        for name in self.tree.names(RECORDS):
            if self.values > bundle.MOST_VALUES:
                self.is_whole = False
                break
            run = self._read_run(name)
            if run is None:
                self.is_whole = False
            else:
                outcome.runs.append(run)
        if not self.tree.names(RECORDS):
            self._problem(RECORDS, "", "a file of records for each run", "none")
        fit = [run for run in outcome.runs if self._check_run(run)]
        self._check_grid(claimed, fit)
        # Numbers are recomputed from a grid in which every run can be read and belongs to one method.
        is_one = len({(run.run.algorithm, run.run.args["hparams"]) for run in outcome.runs}) == 1
        is_unique = len({run.job for run in outcome.runs}) == len(outcome.runs)
        if outcome.runs and self.is_whole and is_one and is_unique and len(fit) == len(outcome.runs):
            self._recompute(claimed)
        outcome.problems = list(dict.fromkeys(outcome.problems))
        return outcome

    def _add(self, problems: Iterable[Problem]) -> None:
        left = max(0, MOST_TOLD - len(self.outcome.problems))
        self.outcome.problems += islice(problems, min(MOST_PROBLEMS, left))

    def _problem(self, file: str, where: str, expected: str, found: str) -> None:
        self._add([Problem(file, where, expected, found)])

    def _cannot(self, what: str) -> None:
        if what not in self.outcome.unchecked:
            self.outcome.unchecked.append(what)

    # what is claimed ----------------------------------------------------------------------------------------------

    def _claimed(self) -> dict[str, Any] | None:
        """submission.json, None where it is not one."""
        if SUBMISSION not in self.tree.sums:
            self._problem(SUBMISSION, "", "what is submitted", "nothing")
            return None
        try:
            document = parse(self.tree.read(SUBMISSION))
        except ValueError as error:
            self._problem(SUBMISSION, "", "a JSON document", str(error))
            return None
        found = list(problems_of(SUBMISSION, document, bundle.SUBMISSION_SCHEMA))
        self._add(found)
        return None if found else document

    # records --------------------------------------------------------------------------------------------------------

    def _read_run(self, file: str) -> SubmittedRun | None:
        """The run of a file, None where its records cannot be understood."""
        parsed: list[dict[str, Any]] = []
        names: dict[str, str] = {}
        is_fit = True
        before = len(self.outcome.problems)
        for number, line in enumerate(self.tree.lines(file), start=1):
            if number > bundle.MOST_RECORDS:
                self._problem(file, "", f"at most {bundle.MOST_RECORDS:,} records", "more lines")
                return None
            if not line.endswith(b"\n"):
                is_long = len(line) > bundle.LONGEST_LINE
                words = f"at most {bundle.LONGEST_LINE:,} bytes" if is_long else "a line that ends"
                self._problem(file, f"line {number}", words, "more" if is_long else "the end of the file")
                return None
            if len(self.outcome.problems) - before > MOST_PROBLEMS:
                return None
            try:
                record = parse(line)
            except ValueError as error:
                self._problem(file, f"line {number}", "a JSON object", str(error))
                is_fit = False
                continue
            found = list(problems_of(file, record, bundle.RECORD_SCHEMA, f"line {number}"))
            self._add(found)
            is_fit &= not found
            if found:
                continue
            record = _compact(record, parsed[0] if parsed else {}, names)
            if len(names) > bundle.MOST_NAMES:
                self._problem(file, f"line {number}", f"at most {bundle.MOST_NAMES:,} names in all records", "more")
                return None
            self.values += sum(
                _count_values(value)
                for name, value in record.items()
                if not (parsed and name in REPEATED and value is parsed[0].get(name))
            )
            parsed.append(record)
            if self.values > bundle.MOST_VALUES:
                self._problem(file, f"line {number}", f"at most {bundle.MOST_VALUES:,} values in all records", "more")
                return None
        if is_fit and not parsed:
            self._problem(file, "", "records, one a line", "none")
        if not is_fit or not parsed:
            return None
        environments = parsed[0]["environments"]
        for number, record in enumerate(parsed, start=1):
            for name in SHARED:
                if _shared(record, name) != _shared(parsed[0], name):
                    where = f"line {number}.{name}"
                    self._problem(file, where, f"{shown(parsed[0].get(name))} as in line 1", shown(record.get(name)))
                    is_fit = False
            expected = {f"env{i}_{split}_acc" for i in range(len(environments)) for split in ("in", "out")}
            of_uda = {f"env{i}_uda_acc" for i in record["args"]["test_envs"]}
            there = {name for name in record if name.startswith("env") and name.endswith("_acc")}
            for name in sorted(expected - there):
                self._problem(file, f"line {number}.{name}", "an accuracy", "nothing")
                is_fit = False
            for name in sorted(there - expected - of_uda):
                self._problem(
                    file, f"line {number}.{name}", f"no such field for {len(environments)} environments", "one"
                )
                is_fit = False
        for env in parsed[0]["args"]["test_envs"]:
            if env >= len(environments):
                self._problem(file, "line 1.args.test_envs", f"numbers below {len(environments)}", str(env))
                is_fit = False
        if (tested := parsed[0]["args"]["test_envs"]) != sorted(tested) or len(tested) >= len(environments):
            # [1, 0] beside [0, 1] would be a second draw of the same job.
            self._problem(file, "line 1.args.test_envs", "rising numbers that leave one to train on", shown(tested))
            is_fit = False
        if not is_fit:
            return None
        name = file.removeprefix(RECORDS + "/").removesuffix(".jsonl")
        try:
            return SubmittedRun(name, parsed, run_of(name, [dict(record) for record in parsed]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._problem(file, "", "records of a run", str(error))
            return None

    def _check_run(self, run: SubmittedRun) -> bool:
        """Everything about a run that does not depend on others; whether its numbers can be put together."""
        file, args = f"{RECORDS}/{run.name}.jsonl", run.run.args
        try:
            cls = get_dataset_class(run.run.dataset)
        except UserError as error:
            self._problem(file, "line 1.args.dataset", "a registered data set", str(error))
            return False
        seed = seed_hash(
            args["dataset"], args["algorithm"], args["test_envs"], args["hparams_seed"], args["trial_seed"]
        )
        if args["seed"] != seed:
            formula = "seed_hash(dataset, algorithm, test_envs, hparams_seed, trial_seed)"
            self._problem(file, "line 1.args.seed", f"{seed}, which is {formula}", shown(args["seed"]))
        steps, every = args["steps"] or cls.N_STEPS, args["checkpoint_freq"] or cls.CHECKPOINT_FREQ
        self._check_steps(file, run, steps, every)
        self._check_accuracies(file, run)
        self._check_costs(file, run)
        if not any(record["final_compression"] for record in run.records):
            self._problem(file, "final_compression", "true in one record at least", "false in all")
        asked = run.run.hparams.get("sparsity")
        if isinstance(asked, float) and run.run.hparams.get("mask_rule", "top_k") == "top_k":
            for number, record in enumerate(run.records, start=1):
                if record["final_compression"] and abs(record["sparsity"] - asked) > SPARSITY_ASKED:
                    words = f"{asked:g}, which hparam sparsity asks for, at final compression (within {SPARSITY_ASKED})"
                    self._problem(file, f"line {number}.sparsity", words, shown(record["sparsity"]))
                    break
        return self._check_hparams(file, run)

    def _check_steps(self, file: str, run: SubmittedRun, steps: int, every: int) -> None:
        found = [record["step"] for record in run.records]
        if steps // every > bundle.MOST_RECORDS:
            self._problem(file, "line 1.args", f"at most {bundle.MOST_RECORDS:,} records a run", f"{steps // every:,}")
            return
        expected = sorted({*range(0, steps, every), steps - 1})
        if found != expected:
            differ = next(
                (i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found))
            )
            told = [f"{shown(some[differ]) if differ < len(some) else 'the end'}" for some in (expected, found)]
            rule = f"every {every:,} of {steps:,} steps and the last"
            self._problem(file, f"line {differ + 1}.step", f"{told[0]} ({rule})", told[1])

    def _check_hparams(self, file: str, run: SubmittedRun) -> bool:
        """The hparams are the draw of their seeds, under the overrides declared; whether their kinds are right."""
        args = run.run.args
        try:
            overrides = parse((args["hparams"] or "{}").encode())
            if not isinstance(overrides, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            self._problem(file, "line 1.args.hparams", "a JSON object as text", f"{shown(args['hparams'])} ({error})")
            return False
        for where, values in (("args.hparams", overrides), ("hparams", run.run.hparams)):
            for name, plain in bundle.without_places(values).items():
                if plain != values[name]:
                    words = f"{shown(plain)}, no path of a machine"
                    self._problem(file, f"line 1.{where}.{name}", words, shown(values[name]))
        try:
            info = registry.get(args["algorithm"])
        except UserError as error:
            self._cannot(f"hparams, masks and costs of {args['algorithm']}: {error}; install the package that has it")
            return True
        try:
            drawn = hparams.resolve_hparams(
                args["algorithm"], args["dataset"], args["hparams_seed"], args["trial_seed"], overrides
            )
        except Exception as error:  # values from a stranger can be anything
            self._problem(file, "line 1.args.hparams", f"hparams of {args['algorithm']}, in their ranges", str(error))
            return False
        is_fit = True
        if refused := _refusal(info, drawn, args["dataset"]):
            self._problem(file, "line 1.args.hparams", f"hparams of {args['algorithm']}, in their ranges", refused)
            is_fit = False
        seeds = f"the draw of hparams_seed {args['hparams_seed']} and trial_seed {args['trial_seed']}"
        for name in sorted({*drawn, *run.run.hparams}):
            there, found = drawn.get(name), run.run.hparams.get(name)
            if there != found or isinstance(there, bool) != isinstance(found, bool):
                source = "args.hparams" if name in overrides else seeds
                expected = f"{shown(there)}, {source}" if name in drawn else "no such hparam"
                self._problem(file, f"line 1.hparams.{name}", expected, "nothing" if found is None else shown(found))
                is_fit &= _kind(there) == _kind(found)
        if run.records[0]["standing"] != info.standing:
            self._problem(file, "line 1.standing", info.standing, run.records[0]["standing"])
        return is_fit

    def _check_unseen(self, file: str, run: SubmittedRun, env: int, n_in: int, n_out: int) -> None:
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
                self._problem(file, f"line {number}.env{env}_in_acc", words, shown(one))
                return

    def _check_accuracies(self, file: str, run: SubmittedRun) -> None:
        facts, args = facts_of(run.run.dataset), run.run.args
        if facts is None or None in facts.sizes:
            self._cannot(f"accuracies of {run.run.dataset}: the sizes of its environments are not known here")
        if facts is None:
            return
        names, shape = run.records[0]["environments"], run.records[0]["input_shape"]
        if tuple(names) != facts.environments:
            self._problem(file, "line 1.environments", shown(list(facts.environments)), shown(names))
            return
        if (digest := run.records[0]["data_digest"]) is not None:
            words = f"null, because {run.run.dataset} stands for the published images"
            self._problem(file, "line 1.data_digest", words, shown(digest))
        for name, value in facts.hparams.items():
            if (given := run.run.hparams.get(name)) != value:
                words = f"{shown(value)}, with which {run.run.dataset} is compared"
                self._problem(file, f"line 1.hparams.{name}", words, shown(given))
        side = run.run.hparams.get("image_size")
        expected = [facts.channels, side, side]
        if shape != expected:
            self._problem(file, "line 1.input_shape", shown(expected), shown(shape))
        for env, size in enumerate(facts.sizes):
            if size is None:
                continue
            splits = split_sizes(size, env in args["test_envs"], args["holdout_fraction"], args["uda_holdout_fraction"])
            if env in args["test_envs"]:
                self._check_unseen(file, run, env, splits["in"], splits["out"])
            for split, count in splits.items():
                name = f"env{env}_{split}_acc"
                for number, record in enumerate(run.records, start=1):
                    if (name in record) != bool(count):
                        expected_words = f"an accuracy of {count} samples" if count else "no such field"
                        self._problem(file, f"line {number}.{name}", expected_words, shown(record.get(name)))
                    elif count and not _is_share(record[name], count):
                        nearest = round(record[name] * count)
                        words = f"a multiple of 1/{count}, such as {nearest / count!r} ({nearest} of {count} samples)"
                        self._problem(file, f"line {number}.{name}", words, shown(record[name]))
        smallest = min(
            (
                split_sizes(size, env in args["test_envs"], args["holdout_fraction"], args["uda_holdout_fraction"])[
                    "in"
                ]
                for env, size in enumerate(facts.sizes)
                if size is not None
            ),
            default=0,
        )
        batch = run.run.hparams.get("batch_size")
        if smallest and None not in facts.sizes and type(batch) is int and 0 < batch <= 2**53:
            for number, record in enumerate(run.records, start=1):
                epoch = record["step"] / (smallest / batch)
                if not math.isclose(record["epoch"], epoch, rel_tol=ROUNDING):
                    self._problem(file, f"line {number}.epoch", shown(epoch), shown(record["epoch"]))

    def _check_costs(self, file: str, run: SubmittedRun) -> None:
        for number, record in enumerate(run.records, start=1):
            for part, whole in (("surviving_parameters", "parameters"), ("macs", "dense_macs")):
                if record[part] > record[whole]:
                    words = f"at most {whole}, {record[whole]:,}"
                    self._problem(file, f"line {number}.{part}", words, f"{record[part]:,}")

    # the grid ------------------------------------------------------------------------------------------------------

    def _check_grid(self, claimed: Mapping[str, Any] | None, fit: Sequence[SubmittedRun]) -> None:
        runs = self.outcome.runs
        jobs: dict[tuple[Any, ...], str] = {}
        for run in runs:
            if run.job in jobs:
                words = (
                    f"a job that no other file holds (data set, test environments, hparams and trial seed: {run.job})"
                )
                self._problem(f"{RECORDS}/{run.name}.jsonl", "line 1.args", words, f"that of {jobs[run.job]}")
            jobs.setdefault(run.job, f"{RECORDS}/{run.name}.jsonl")
        self._check_copies(runs)
        first = runs[0] if runs else None
        for run in runs:
            file = f"{RECORDS}/{run.name}.jsonl"
            for name in ("algorithm", "hparams", "uda_holdout_fraction"):
                if first and run.run.args[name] != first.run.args[name]:
                    words = f"{shown(first.run.args[name])} as in {RECORDS}/{first.name}.jsonl"
                    self._problem(file, f"line 1.args.{name}", words, shown(run.run.args[name]))
        declared = {} if claimed is None else {name: one["protocol"] for name, one in claimed["datasets"].items()}
        for dataset in sorted({run.run.dataset for run in runs} | set(declared)):
            here = [run for run in runs if run.run.dataset == dataset]
            grids = [{**declared[dataset], "where": SUBMISSION}] if dataset in declared else []
            if here:
                self._check_conditions([run for run in here if run in fit])
                grids.append({**_grid(here), "where": RECORDS})
            self._check_product(dataset, grids, set(jobs))

    def _check_copies(self, runs: Sequence[SubmittedRun]) -> None:
        """No run is another trial's under a new name: trials split the samples anew. A run whose accuracies never move
        is let pass: a network that has collapsed can give the same ones twice."""
        seen: dict[tuple[Any, ...], SubmittedRun] = {}
        for run in runs:
            rows = [(*inner, *outer) for inner, outer in zip(run.run.in_acc.tolist(), run.run.out_acc.tolist())]
            if len(set(rows)) < 2:
                continue
            other = seen.setdefault((run.run.dataset, run.run.test_envs, *rows), run)
            if other.run.trial_seed != run.run.trial_seed:
                words = f"accuracies of its own, not all those of {RECORDS}/{other.name}.jsonl, another trial's"
                self._problem(f"{RECORDS}/{run.name}.jsonl", "accuracies", words, "the same in every record")

    def _check_conditions(self, runs: Sequence[SubmittedRun]) -> None:
        """One protocol for all runs of a data set."""
        for run in runs:
            expected = summary.conditions(runs[0].run)
            for name, value in summary.conditions(run.run).items():
                if value != expected[name]:
                    words = f"{shown(expected[name])} as in {RECORDS}/{runs[0].name}.jsonl"
                    self._problem(f"{RECORDS}/{run.name}.jsonl", f"protocol, {name}", words, shown(value))

    def _check_product(self, dataset: str, grids: Sequence[Mapping[str, Any]], jobs: set[tuple[Any, ...]]) -> None:
        """All test environments x hparams seeds x trial seeds are there, and the seeds begin at 0: none was chosen."""
        wanted: dict[tuple[Any, ...], None] = {}
        axes: dict[str, set[Any]] = {"test_envs": set(), "hparams_seeds": set(), "trial_seeds": set()}
        for grid in grids:
            axes["test_envs"] |= {tuple(envs) for envs in grid["test_envs"]}
            for name in ("hparams_seeds", "trial_seeds"):
                axes[name] |= set(grid[name])
                if sorted(grid[name]) != list(range(len(grid[name]))):
                    where = (
                        f"datasets.{dataset}.protocol.{name}" if grid["where"] == SUBMISSION else f"{dataset}, {name}"
                    )
                    words = f"{shown(list(range(len(grid[name]))))}: all from 0 on"
                    self._problem(grid["where"], where, words, shown(grid[name]))
        environments = len(grids[0]["environments"])
        if any(len(envs) == 2 for envs in axes["test_envs"]):
            axes["test_envs"] |= {(i, j) for i in range(environments) for j in range(i, environments) if i != j}
            axes["test_envs"] |= {(i,) for i in range(environments)}
        if math.prod(map(len, axes.values())) > bundle.MOST_FILES:
            self._problem(SUBMISSION, f"datasets.{dataset}.protocol", f"at most {bundle.MOST_FILES:,} runs", "more")
            return
        for envs, hparams_seed, trial_seed in product(*(sorted(axis) for axis in axes.values())):
            wanted[dataset, envs, hparams_seed, trial_seed] = None
        for job in wanted:
            if job not in jobs:
                words = f"a run with test_envs {list(job[1])}, hparams_seed {job[2]}, trial_seed {job[3]}"
                self._problem(RECORDS, f"{dataset}, the grid", words, "none")

    # everything anew ------------------------------------------------------------------------------------------------

    def _recompute(self, claimed: Mapping[str, Any] | None) -> None:
        """The submission as the records give it, against the one that is claimed; and the masks behind it."""
        runs = self.outcome.runs
        document = summary.document_of(claimed["name"] if claimed else "submission", runs, claimed)
        self.outcome.submission = document
        if claimed is not None:
            self._compare_submission(document, claimed)
            if taken := summary.taken_name(claimed["name"], document["algorithm"]):
                self._problem(
                    SUBMISSION, "name", f"a name of its own, not that of algorithm {taken}", shown(claimed["name"])
                )
        if len(codes := {run.records[0].get("code") for run in runs}) > 1:
            self._problem(RECORDS, "code", "one version of the algorithm's package in all runs", f"{len(codes)}")
        chosen: dict[tuple[str, int], None] = {}
        for dataset in document["datasets"]:
            for _, choices in summary.results_of([one.run for one in runs if one.run.dataset == dataset]).values():
                chosen.update(dict.fromkeys((one.run.directory, one.run.steps[one.checkpoint]) for one in choices))
        needed: dict[str, None] = {}
        self.recomputed = {
            dataset: {name for result in one["results"].values() for name in result["costs"]}
            for dataset, one in document["datasets"].items()
        }
        claimed_costs = {dataset: set(names) for dataset, names in self.recomputed.items()}
        for run in runs:
            numbers = [n for n, one in enumerate(run.records, start=1) if (run.name, one["step"]) in chosen]
            network = self._network(run) if numbers else None
            for number in numbers:
                needed.update(self._check_masks(run, number, network))
        for dataset, names in claimed_costs.items():
            self.outcome.unverified[dataset] = [
                name for name in COST_FIELDS if name in names - self.recomputed[dataset]
            ]
        for name in self.tree.names(MASKS):
            if name not in needed:
                self._problem(name, "", "masks of a checkpoint that a selection rule chooses", "others")

    def _compare_submission(self, document: Mapping[str, Any], claimed: Mapping[str, Any]) -> None:
        best: dict[tuple[str, int, int], float] = {}
        for run in self.outcome.runs:
            if len(run.run.test_envs) == 1:
                key = (run.run.dataset, run.run.test_envs[0], run.run.trial_seed)
                final = [100 * record[f"env{key[1]}_in_acc"] for record in run.records if record["final_compression"]]
                best[key] = max([best.get(key, 0.0), *final])
        for path, expected, found in differences(document, claimed):
            where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
            words = shown(expected) if expected is not _NOTHING else "no such field"
            told = shown(found) if found is not _NOTHING else "nothing"
            if path[0] == "datasets" and len(path) > 4 and path[2] == "results":
                words += ", from the records"
                told += _peeking(path, claimed, best)
            self._problem(SUBMISSION, where, words, told)

    def _network(self, run: SubmittedRun) -> _Network | None:
        """The run's network built anew, None where that cannot be done here."""
        facts, shape = facts_of(run.run.dataset), tuple(run.records[0]["input_shape"])
        if facts is None:
            self._cannot(f"costs on {run.run.dataset}: its number of classes is not known here")
            return None
        values = {**run.run.hparams, "weights": "none"}  # what is counted does not depend on them
        domains = len(run.records[0]["environments"]) - len(run.run.test_envs)
        if (weights := _featurizer_weights(shape, values)) > bundle.MOST_PARAMETERS:
            words = f"a network of at most {bundle.MOST_PARAMETERS:,} parameters"
            self._problem(f"{RECORDS}/{run.name}.jsonl", "line 1.hparams.backbone", words, f"{weights:,}")
            return None
        try:
            algorithm = registry.get(run.run.algorithm).cls(shape, facts.classes, domains, values)
            algorithm.total_steps = run.run.args["steps"] or get_dataset_class(run.run.dataset).N_STEPS
            positions = accounting.count_positions(algorithm, shape, algorithm.predict)
            return _Network(algorithm, positions, algorithm.deployed_parameters(), algorithm.costs())
        except Exception as error:  # an optional package that is not here, or hparams that fit no network
            self._cannot(f"masks and costs of {run.run.algorithm}: its network cannot be built here ({error})")
            return None

    def _check_masks(self, run: SubmittedRun, number: int, network: _Network | None) -> dict[str, None]:
        """The masks of a chosen checkpoint, and its costs by a network built anew; the files that were needed."""
        where, record = f"{RECORDS}/{run.name}.jsonl", run.records[number - 1]
        if network is None:
            self.recomputed[run.run.dataset].clear()
        if "masks" not in record:
            if network is not None:
                self._compare_costs(run, number, network, {}, where)
            return {}
        file = f"{MASKS}/{record['masks']}{mask_files.SUFFIX}"
        if file not in self.tree.sums:
            self._problem(file, "", f"the masks of {where}, line {number}", "no file")
            return {}
        data = self.tree.read(file)
        try:
            declared = mask_headers.shapes_of(data)
        except ValueError as error:
            self._problem(file, "", "masks, one bit a weight", f"not a file of masks ({error})")
            return {file: None}
        # What the network cannot have is not unpacked.
        weights = sum(map(math.prod, declared.values()))
        if weights > record["parameters"]:
            words = f"at most {record['parameters']:,} weights, the parameters of {where}, line {number}"
            self._problem(file, "masks", words, f"{weights:,}")
            return {file: None}
        if network is not None:
            shapes = {name: parameter.shape for name, parameter in network.algorithm.named_parameters()}
            if misfit := mask_headers.misfits(file, declared, shapes, run.run.algorithm):
                self.outcome.problems.append(misfit)
                return {file: None}
        try:
            masks = mask_files.unpack(data)
        except UserError as error:
            self._problem(file, "", "masks, one bit a weight", str(error))
            return {file: None}
        if (digest := mask_files.digest(masks)) != record["masks"]:
            self._problem(file, "digest of the masks", record["masks"], digest)
        elif network is not None:
            self._compare_costs(run, number, network, masks, file)
        return {file: None}

    def _compare_costs(
        self, run: SubmittedRun, number: int, network: _Network, masks: Mapping[str, Any], file: str
    ) -> None:
        where, record = f"{RECORDS}/{run.name}.jsonl", run.records[number - 1]
        algorithm, others = network.algorithm, network.costs
        cost = accounting.measure_cost(network.deployed, network.positions, masks)
        known = {name: getattr(cost, name) for name in ("parameters", "surviving_parameters", "dense_macs", "macs")}
        known |= costs.settled(algorithm, others, masks)
        for name in known.keys() & record.keys():
            if (expected := known[name]) != record[name]:
                words = "null" if expected is None else f"{expected:,}"
                self._problem(where, f"line {number}.{name}", f"{words}, by {file}", _counted(record[name]))
        for name in ("bitops", "bitops_8bit", "mean_bits"):
            if (name in others) != (record.get(name) is not None):
                words = f"a number, as {run.run.algorithm} is quantized" if name in others else "no such field"
                self._problem(where, f"line {number}.{name}", words, shown(record.get(name)))
        for name, (low, high) in costs.limits(algorithm).items():
            if record.get(name) is not None and not low <= record[name] <= high:
                words = f"from {low:,} to {high:,}, by {run.run.algorithm}'s layers"
                self._problem(where, f"line {number}.{name}", words, _counted(record[name]))
        self.recomputed[run.run.dataset] &= {*(known.keys() & record.keys()), "sparsity"}
        removed = accounting.sparsities_of(algorithm, masks) or {"weight": 0.0}
        if all(abs(value - record["sparsity"]) > SPARSITY_ROUNDING for value in removed.values()):
            words = " or ".join(f"{value:.6g} of the {unit}s" for unit, value in removed.items())
            self._problem(where, f"line {number}.sparsity", f"{words}, by {file}", shown(record["sparsity"]))


_NOTHING = object()


def differences(expected: Any, found: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any, Any]]:
    """Where two JSON values differ: (path, expected, found); numbers may differ by ROUNDING."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name in {**expected, **found}:
            yield from differences(expected.get(name, _NOTHING), found.get(name, _NOTHING), (*path, name))
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found)):
            yield from differences(one, other, (*path, index))
    else:
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (expected, found))
        same = math.isclose(expected, found, rel_tol=ROUNDING, abs_tol=ROUNDING) if numbers else expected == found
        if not same or isinstance(expected, bool) != isinstance(found, bool):
            yield path, expected, found


def _planned(claimed: Mapping[str, Any]) -> int:
    """How many runs a submission says it has."""
    axes = ("test_envs", "hparams_seeds", "trial_seeds")
    protocols = [one["protocol"] for one in claimed["datasets"].values()]
    return sum(math.prod(len(protocol[axis]) for axis in axes) for protocol in protocols)


def _counted(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else shown(value)


def _shared(record: Mapping[str, Any], name: str) -> Any:
    """What a field of SHARED must be alike in."""
    if name == "args":
        return {argument: value for argument, value in record["args"].items() if argument not in SURROUNDINGS}
    return record.get(name)


def _compact(record: Mapping[str, Any], first: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A record in little memory: its names, and what it repeats of the first one, are kept once."""
    shared = REPEATED & set(first)
    return {
        names.setdefault(name, name): first[name] if name in shared and first[name] == value else value
        for name, value in record.items()
    }


def _count_values(value: Any) -> int:
    if isinstance(value, (dict, list)):
        return 1 + sum(map(_count_values, value.values() if isinstance(value, dict) else value))
    return 1


def _grid(runs: Sequence[SubmittedRun]) -> dict[str, Any]:
    return {
        "environments": runs[0].records[0]["environments"],
        "test_envs": sorted({run.run.test_envs for run in runs}),
        "hparams_seeds": sorted({run.run.hparams_seed for run in runs}),
        "trial_seeds": sorted({run.run.trial_seed for run in runs}),
    }


def _refusal(info: registry.AlgorithmInfo, values: Mapping[str, Any], dataset: str) -> str | None:
    """Why an algorithm does not take these hparams, None where it does: it checks most ranges when it is made. A small
    network serves, if the defaults do with it: the run's own may need a package that is not here."""
    small = {"backbone": "mnist_cnn", "weights": "none"}
    usual = hparams.resolve_hparams(info.name, dataset)
    with torch.random.fork_rng(devices=[]):
        try:
            info.cls((3, 8, 8), 4, 3, {**values, **small})
            return None
        except Exception as error:  # values from a stranger can be anything
            refused = str(error) or type(error).__name__
        try:
            info.cls((3, 8, 8), 4, 3, {**usual, **small})
        except Exception:  # it needs another network: nothing can be said
            return None
    return refused


def _featurizer_weights(shape: tuple[int, ...], values: Mapping[str, Any]) -> int:
    """How many parameters a featurizer would have, without the memory for them; 0 where it cannot be built here."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in networks.make_featurizer(shape, values).parameters())
    except Exception:  # what is wrong is told where the whole network is built
        return 0


def _kind(value: Any) -> type:
    """Of an hparam: whole numbers count as numbers."""
    return float if type(value) is int else type(value)


def _is_share(value: float, count: int) -> bool:
    """Whether `value` is k / count for a whole k, as a division gives it."""
    return 0 <= value <= 1 and abs(round(value * count) / count - value) < 1e-12


def _peeking(
    path: tuple[str | int, ...], claimed: Mapping[str, Any], best: Mapping[tuple[str, int, int], float]
) -> str:
    """What to add where a claimed choice is the best on the test environment, under a rule that must not look there."""
    dataset, rule = str(path[1]), path[3]
    if rule == ORACLE.key or "trials" not in path or path[4] != "cells" or not isinstance(path[5], int):
        return ""
    cell = claimed["datasets"][dataset]["results"][rule]["cells"][path[5]]
    at = path[path.index("trials") + 1] if path.index("trials") + 1 < len(path) else None
    if cell is None or not isinstance(at, int) or at >= len(cell["trials"]):
        return ""
    trial = cell["trials"][at]
    highest = best.get((dataset, path[5], trial["trial_seed"]))
    if highest is None or abs(trial["accuracy"] - highest) > ROUNDING:
        return ""
    return f" (chosen by the highest accuracy on the test environment, which {rule} selection must not see)"


def text_of(outcome: Validation, limit: int = 200) -> str:
    """The outcome for people."""
    lines = [problem.line() for problem in outcome.problems[:limit]]
    if len(outcome.problems) > limit:
        lines.append(f"... and {len(outcome.problems) - limit:,} more problems")
    lines += [printable(f"not checked: {what}") for what in outcome.unchecked]
    document = outcome.submission
    if outcome.tier is None or document is None:
        count = len(outcome.problems)
        lines.append(f"{outcome.root}: rejected, {count:,} problem{'s' * (count != 1)}.")
        return "\n".join(lines) + "\n"
    kinds = "transductive, " if document["transductive"] else ""
    for dataset, one in document["datasets"].items():
        if names := outcome.unverified.get(dataset):
            lines.append(printable(f"not recomputed on {dataset}, and marked so: {', '.join(names)}"))
        reasons = outcome.reasons_for_open(dataset)
        track = f"open track ({'; '.join(reasons)})" if reasons else "closed track"
        lines.append(printable(f"{document['name']} on {dataset}: {kinds}{track}."))
        for rule, result in one["results"].items():
            cells = [f"{cell['environment']} {cell['accuracy']:.1f}" for cell in result["cells"] if cell is not None]
            average = result["average"]
            mean = f"; average {average['accuracy']:.1f}" if average else ""
            lines.append(printable(f"    {rule}: {', '.join(cells)}{mean}"))
    again = outcome.rerun
    for one in again.agreed if again else ():
        lines.append(printable(f"computed anew: {one.run} {one.agreement} (difference {one.difference:.2f} points)"))
    words = f" (tolerance between machines {again.tolerance:g} points, seed {again.seed})" if again else ""
    lines.append(f"{outcome.root}: {len(outcome.runs)} runs, tier {outcome.tier}{words}.")
    return "\n".join(lines) + "\n"


def json_of(outcome: Validation) -> str:
    """The outcome for programs, one document whether runs were computed anew or not: `rerun` is null where not."""
    again = outcome.rerun
    document = {
        "bundle": str(outcome.root),
        "tier": outcome.tier,
        "problems": [vars(problem) for problem in outcome.problems],
        "unchecked": outcome.unchecked,
        "unverified": outcome.unverified,
        "rerun": again and {"outcome": again.outcome, **asdict(again)},
        "submission": outcome.submission,
    }
    return json.dumps(document, indent=1) + "\n"
