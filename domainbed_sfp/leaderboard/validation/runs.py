"""What a single run says: seed, steps, compression and the bounds of costs."""

from __future__ import annotations

from collections.abc import Iterator

from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.errors import UserError
from domainbed_sfp.leaderboard import bundle as layout
from domainbed_sfp.leaderboard.schema import Problem, shown
from domainbed_sfp.leaderboard.summary import SubmittedRun
from domainbed_sfp.leaderboard.validation.accuracies import check_accuracies
from domainbed_sfp.leaderboard.validation.context import Bundle, RunCheck, records_of
from domainbed_sfp.leaderboard.validation.settings import check_hparams
from domainbed_sfp.records import SPARSITY_ASKED
from domainbed_sfp.seeds import seed_hash


def check_runs(bundle: Bundle) -> Iterator[Problem]:
    """Everything about a run that does not depend on others."""
    for run in bundle.runs:
        try:
            get_dataset_class(run.run.dataset)
        except UserError as error:
            yield Problem(records_of(run), "line 1.args.dataset", "a registered data set", str(error))
            bundle.unfit.add(run.name)
            continue
        for check in OF_A_RUN:
            yield from check(bundle, run)


def check_seed(bundle: Bundle, run: SubmittedRun) -> Iterator[Problem]:
    """The seed is DomainBed's hash of what the run is."""
    args = run.run.args
    seed = seed_hash(args["dataset"], args["algorithm"], args["test_envs"], args["hparams_seed"], args["trial_seed"])
    if args["seed"] != seed:
        formula = "seed_hash(dataset, algorithm, test_envs, hparams_seed, trial_seed)"
        yield Problem(records_of(run), "line 1.args.seed", f"{seed}, which is {formula}", shown(args["seed"]))


def check_steps(bundle: Bundle, run: SubmittedRun) -> Iterator[Problem]:
    """A record at every checkpoint, and no other."""
    args, cls = run.run.args, get_dataset_class(run.run.dataset)
    steps, every = args["steps"] or cls.N_STEPS, args["checkpoint_freq"] or cls.CHECKPOINT_FREQ
    if steps // every > layout.MOST_RECORDS:
        words = f"at most {layout.MOST_RECORDS:,} records a run"
        yield Problem(records_of(run), "line 1.args", words, f"{steps // every:,}")
        return
    found = [record["step"] for record in run.records]
    expected = sorted({*range(0, steps, every), steps - 1})
    if run.run.evaluate == "final":
        # What is left out are checkpoints before final compression, which no rule of selection may choose.
        expected = [step for step in expected if step in found or step == steps - 1]
    if found != expected:
        differ = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
        told = [f"{shown(some[differ]) if differ < len(some) else 'the end'}" for some in (expected, found)]
        rule = f"every {every:,} of {steps:,} steps and the last"
        yield Problem(records_of(run), f"line {differ + 1}.step", f"{told[0]} ({rule})", told[1])


def check_cost_bounds(bundle: Bundle, run: SubmittedRun) -> Iterator[Problem]:
    """What survives is no more than there was."""
    for number, record in enumerate(run.records, start=1):
        for part, whole in (("surviving_parameters", "parameters"), ("macs", "dense_macs")):
            if record[part] > record[whole]:
                words = f"at most {whole}, {record[whole]:,}"
                yield Problem(records_of(run), f"line {number}.{part}", words, f"{record[part]:,}")


def check_compression(bundle: Bundle, run: SubmittedRun) -> Iterator[Problem]:
    """The run comes to its final compression, and has there the sparsity that was asked for."""
    if not any(record["final_compression"] for record in run.records):
        yield Problem(records_of(run), "final_compression", "true in one record at least", "false in all")
    asked = run.run.hparams.get("sparsity")
    if not isinstance(asked, float) or run.run.hparams.get("mask_rule", "top_k") != "top_k":
        return
    for number, record in enumerate(run.records, start=1):
        if record["final_compression"] and abs(record["sparsity"] - asked) > SPARSITY_ASKED:
            words = f"{asked:g}, which hparam sparsity asks for, at final compression (within {SPARSITY_ASKED})"
            yield Problem(records_of(run), f"line {number}.sparsity", words, shown(record["sparsity"]))
            return


OF_A_RUN: tuple[RunCheck, ...] = (
    check_seed,
    check_steps,
    check_accuracies,
    check_cost_bounds,
    check_compression,
    check_hparams,
)
