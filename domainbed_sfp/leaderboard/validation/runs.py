"""Everything about a run that does not depend on others."""

from __future__ import annotations

from collections.abc import Iterator

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard.bundle import layout as layout
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.accuracies import check_accuracies
from domainbed_sfp.leaderboard.validation.bits import check_bits
from domainbed_sfp.leaderboard.validation.compression import check_final_flags, check_model_stays, check_sparsity
from domainbed_sfp.leaderboard.validation.context import Bundle, RunCheck, records_of
from domainbed_sfp.leaderboard.validation.settings import check_arguments, check_fields, check_hparams


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


def check_steps(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
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
        known = bundle.expected.get(run.name)
        first = found[0] if known is None or known.final_step is None else known.final_step
        # What is left out are checkpoints before final compression, which no rule of selection may choose.
        expected = [step for step in expected if step >= first or step == steps - 1]
    if found != expected:
        differ = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
        told = [f"{shown(some[differ]) if differ < len(some) else 'the end'}" for some in (expected, found)]
        rule = f"every {every:,} of {steps:,} steps and the last"
        yield Problem(records_of(run), f"line {differ + 1}.step", f"{told[0]} ({rule})", told[1])


def check_cost_bounds(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """What survives is no more than there was."""
    for number, record in enumerate(run.records, start=1):
        for part, whole in (("surviving_parameters", "parameters"), ("macs", "dense_macs")):
            if record[part] > record[whole]:
                words = f"at most {whole}, {record[whole]:,}"
                yield Problem(records_of(run), f"line {number}.{part}", words, f"{record[part]:,}")


def check_times(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """Time does not run backwards."""
    earlier = 0.0
    for number, record in enumerate(run.records, start=1):
        if (now := record.get("wall_time", earlier)) < earlier:
            yield Problem(
                records_of(run), f"line {number}.wall_time", f"at least {earlier}, that of the line before", shown(now)
            )
            return
        earlier = now


OF_A_RUN: tuple[RunCheck, ...] = (
    check_arguments,
    check_hparams,
    check_steps,
    check_times,
    check_accuracies,
    check_cost_bounds,
    check_fields,
    check_final_flags,
    check_model_stays,
    check_sparsity,
    check_bits,
)
