"""The actions of `domainbed-sfp leaderboard`."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
from datetime import datetime, timezone

from domainbed_sfp import registry
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.errors import UserError
from domainbed_sfp.leaderboard import entries, rerun, validation
from domainbed_sfp.leaderboard.entries import TIERS
from domainbed_sfp.leaderboard.validation import Validation

# Where `add` writes unless a flag says otherwise: what need not be told.
ENTRIES_DIR = "results/entries"


def validate(args: argparse.Namespace) -> int:
    """Prints what is wrong with a bundle, or what it shows; 1 where something is wrong."""
    outcome = _examine(args)
    sys.stdout.write(validation.json_of(outcome) if args.json else validation.text_of(outcome))
    if outcome.tier == TIERS[2] and not args.json:
        print(
            f"Its entry gets this tier from the rerun of `{_command(args, outcome)}`; a report of one does not count."
        )
    return 0 if outcome.tier else 1


def add(args: argparse.Namespace) -> int:
    """Writes the entries of a bundle that is right; 1 where it is not."""
    outcome = _examine(args)
    if outcome.tier is None:
        sys.stdout.write(validation.text_of(outcome))
        return 1
    again = _command(args, outcome)
    for entry in entries_of(outcome):
        path = entries.write(args.entries_dir, entry, again)
        print(f"{path}: {entry.name} on {entry.dataset}, {entry.track}, {entry.tier}")
    if outcome.tier == TIERS[1]:
        print(
            f"`{again}` computes runs anew and raises it to {TIERS[2]}; an earlier `validate --rerun` does not count."
        )
    return 0


def _command(args: argparse.Namespace, outcome: Validation) -> str:
    """The command that adds this bundle as rerun-verified."""
    words = ["domainbed-sfp", "leaderboard", "add", args.bundle, "--rerun", str(args.rerun or 1)]
    kept = ("entries_dir", "tolerance", "data_dir", "cache_dir")
    values = {name: getattr(args, name, None) for name in kept}
    if values["data_dir"] is None and not all(get_dataset_class(run.run.dataset).EMBEDDED for run in outcome.runs):
        values["data_dir"] = "DIR"
    if values["entries_dir"] == ENTRIES_DIR:
        values["entries_dir"] = None
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def entries_of(outcome: Validation) -> list[entries.Entry]:
    """An entry for each data set of a bundle without problems."""
    document = outcome.submission
    if document is None or outcome.tier is None:
        raise UserError(f"{outcome.root} is rejected; `leaderboard validate` says why")
    found = []
    for dataset, one in document["datasets"].items():
        reasons, again = outcome.reasons_for_open(dataset), outcome.rerun_of(dataset)
        notes = [f"Open track: {reason}." for reason in reasons] + [
            f"Not checked: {what}." for what in outcome.unchecked
        ]
        found.append(
            entries.Entry(
                name=document["name"],
                dataset=dataset,
                algorithm=document["algorithm"],
                settings=document["settings"],
                tier=outcome.tier_of(dataset),
                track="open" if reasons else "closed",
                transductive=document["transductive"],
                standing=document["standing"],
                reference=document["reference"],
                protocol=one["protocol"],
                results={key: entries.result_from_json(result) for key, result in one["results"].items()},
                unverified=tuple(outcome.unverified[dataset]),
                rerun=again,
                bundle=outcome.sums,
                date=datetime.now(timezone.utc).date().isoformat(),
                package=document["package"],
                commit=document["commit"],
                notes=tuple(note[:500] for note in notes),
            )
        )
    return found


def _examine(args: argparse.Namespace) -> Validation:
    """Validates, and computes anew what `--rerun` asks for; what disagrees is among the problems then."""
    tolerance = rerun.TOLERANCE if args.tolerance is None else args.tolerance
    if not 0 <= tolerance <= 100:
        raise UserError(f"--tolerance: expected points of accuracy from 0 to 100, got {tolerance:g}")
    if args.rerun_seed is not None and not 0 <= args.rerun_seed < 2**31:
        raise UserError(f"--rerun_seed: expected a whole number from 0 to {2**31 - 1}, got {args.rerun_seed}")
    outcome = validation.validate(args.bundle)
    if args.rerun is None:
        return outcome
    seed = secrets.randbelow(2**31) if args.rerun_seed is None else args.rerun_seed
    outcome.rerun = rerun.Rerun(seed, tolerance)
    if outcome.tier is None:
        print("--rerun waits until the records are right", file=sys.stderr)
        return outcome
    unknown = sorted({run.run.algorithm for run in outcome.runs} - set(registry.names()))
    if unknown:
        print(
            f"--rerun: nothing was computed anew, {', '.join(unknown)} is not installed here; install the package that "
            "has it",
            file=sys.stderr,
        )
        return outcome
    chosen = rerun.choose(outcome.runs, args.rerun, seed)
    print(
        f"Computing {len(chosen)} of {len(outcome.runs)} runs anew (--rerun_seed {seed}): {rerun.here()}",
        file=sys.stderr,
    )
    for run in chosen:
        print(f"    {run.name}: {run.run.dataset} {run.run.algorithm} {run.job[1:]}", file=sys.stderr, flush=True)
        one, problems = rerun.recompute(run, args.data_dir, args.cache_dir, tolerance)
        outcome.problems += problems
        outcome.rerun.runs.append(run.name)
        if one is not None:
            outcome.rerun.agreed.append(one)
    return outcome
