"""The actions of `domainbed-sfp leaderboard`."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
from datetime import datetime, timezone

from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.errors import UserError, check_range
from domainbed_sfp.leaderboard import comparing, entries, rerun, store, summary, validation
from domainbed_sfp.leaderboard.computing import HOURS, Place
from domainbed_sfp.leaderboard.consistency import NOT_CHECKED, OPEN_TRACK, note_of
from domainbed_sfp.leaderboard.first_steps import check_first_steps
from domainbed_sfp.leaderboard.models import check_models
from domainbed_sfp.leaderboard.outcomes import Rerun
from domainbed_sfp.leaderboard.tiers import RERUN_VERIFIED, TIERS
from domainbed_sfp.leaderboard.validation import Validation

# Where `add` writes unless a flag says otherwise: what need not be told.
ENTRIES_DIR = "results/entries"
MOST_RERUN = 1000


def validate(args: argparse.Namespace) -> int:
    """Prints what is wrong with a bundle, or what it shows; 1 where something is wrong."""
    outcome = _examine(args)
    sys.stdout.write(validation.json_of(outcome) if args.json else validation.text_of(outcome))
    if outcome.tier in TIERS[TIERS.index(RERUN_VERIFIED) :] and not args.json:
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
    for entry in entries_of(outcome, args.archive):
        path = store.write(args.entries_dir, entry, again)
        print(f"{path}: {entry.name} on {entry.dataset}, {entry.track}, {entry.tier}")
    if outcome.tier in TIERS[1 : TIERS.index(RERUN_VERIFIED)]:
        print(
            f"`{again}` trains runs again and raises it to {RERUN_VERIFIED} or higher; an earlier `validate --rerun` "
            "does not count."
        )
    return 0


def _command(args: argparse.Namespace, outcome: Validation) -> str:
    """The command that adds this bundle as rerun-verified."""
    words = ["domainbed-sfp", "leaderboard", "add", args.bundle, "--rerun", str(args.rerun or 1)]
    kept = ("entries_dir", "tolerance", "hours", "data_dir", "cache_dir")
    values = {name: getattr(args, name, None) for name in kept}
    if values["data_dir"] is None and not all(get_dataset_class(run.run.dataset).EMBEDDED for run in outcome.runs):
        values["data_dir"] = "DIR"
    if values["entries_dir"] == ENTRIES_DIR:
        values["entries_dir"] = None
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def entries_of(outcome: Validation, archive: str | None = None) -> list[entries.Entry]:
    """An entry for each data set of a bundle without problems, which lies at `archive`."""
    document = outcome.submission
    if document is None or outcome.tier is None:
        raise UserError(f"{outcome.root} is rejected; `leaderboard validate` says why")
    found = []
    for dataset, one in document["datasets"].items():
        reasons = outcome.reasons_for_open(dataset)
        notes = [note_of(OPEN_TRACK, reason) for reason in reasons]
        notes += [note_of(NOT_CHECKED, what) for what in outcome.unchecked]
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
                **outcome.computed(dataset),
                runs=tuple(summary.digests_of([run for run in outcome.runs if run.run.dataset == dataset])),
                bundle=outcome.sums,
                date=datetime.now(timezone.utc).date().isoformat(),
                package=document["package"],
                commit=document["commit"],
                author=document.get("author"),
                archive=archive,
                notes=tuple(notes),
            )
        )
    return found


def _examine(args: argparse.Namespace) -> Validation:
    """Validates; computes what can be computed here of the first steps and the models, unless only the records are
    asked for; and trains again what `--rerun` asks for. What disagrees is among the problems then."""
    place, tolerance = _place(args), comparing.TOLERANCE if args.tolerance is None else args.tolerance
    if not 0 <= tolerance <= comparing.TOLERANCE:
        raise UserError(
            f"--tolerance: expected points of accuracy from 0 to {comparing.TOLERANCE:g}, got {tolerance:g}"
        )
    check_range("--rerun_seed", args.rerun_seed, 0, 2**31 - 1)
    check_range("--rerun", args.rerun, 1, MOST_RERUN)
    outcome = validation.validate(args.bundle)
    if outcome.tier is not None and outcome.tree is not None and not args.records_only:
        check_models(outcome, outcome.tree, place)
        check_first_steps(outcome, place)
    if args.rerun is None:
        return outcome
    # Drawn here, when the bundle's digest is known: its author cannot choose the runs.
    seed = secrets.randbelow(2**31) if args.rerun_seed is None else args.rerun_seed
    outcome.rerun = Rerun(seed, args.rerun, tolerance)
    if outcome.tier is None:
        print("--rerun waits until the records are right", file=sys.stderr)
    else:
        rerun.train_again(outcome, outcome.rerun, place)
    return outcome


def _place(args: argparse.Namespace) -> Place:
    hours = HOURS if args.hours is None else args.hours
    if not 0 < hours < float("inf"):
        raise UserError(f"--hours: expected a number of hours above 0, got {hours:g}")
    return Place(args.data_dir, args.cache_dir, hours)
