"""The actions of `domainbed-sfp leaderboard`."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
from pathlib import Path

from domainbed_sfp.core.errors import UserError, check_range
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle import archives
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.entries.making import entries_of
from domainbed_sfp.leaderboard.rerun import comparing, whole_runs
from domainbed_sfp.leaderboard.rerun.first_steps import check_first_steps
from domainbed_sfp.leaderboard.rerun.models import check_models
from domainbed_sfp.leaderboard.rerun.place import Place, place_of
from domainbed_sfp.leaderboard.tiers import RERUN_VERIFIED, TIERS
from domainbed_sfp.leaderboard.validation import Validation
from domainbed_sfp.leaderboard.validation.outcomes import Rerun

# Where `add` writes unless a flag says otherwise: what need not be told.
ENTRIES_DIR = "results/entries"
MOST_RERUN = 1000


def validate(args: argparse.Namespace) -> int:
    """Prints what is wrong with a bundle, or what it shows; 1 where something is wrong, 2 where nothing is validated,
    which a report for programs says too."""
    try:
        outcome = _examine(args)
    except UserError as error:
        if args.json:
            sys.stdout.write(validation.refusal_json(args.bundle, error))
        raise
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
    kept = ("entries_dir", "archive", "tolerance", "hours", "data_dir", "cache_dir")
    values = {name: getattr(args, name, None) for name in kept}
    if values["data_dir"] is None and not all(get_dataset_class(run.run.dataset).EMBEDDED for run in outcome.runs):
        values["data_dir"] = "DIR"
    if values["entries_dir"] == ENTRIES_DIR:
        values["entries_dir"] = None
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def _examine(args: argparse.Namespace) -> Validation:
    """Validates; computes what can be computed here of the first steps and the models, unless only the records are
    asked for; and trains again what `--rerun` asks for. What disagrees is among the problems then."""
    place, tolerance = place_of(args), comparing.TOLERANCE if args.tolerance is None else args.tolerance
    if not 0 <= tolerance <= comparing.TOLERANCE:
        raise UserError(
            f"--tolerance: expected points of accuracy from 0 to {comparing.TOLERANCE:g}, got {tolerance:g}"
        )
    check_range("--rerun_seed", args.rerun_seed, 0, 2**31 - 1)
    check_range("--rerun", args.rerun, 1, MOST_RERUN)
    with archives.opened(args.bundle) as folder:
        outcome = _compute(args, folder, place, tolerance)
    outcome.root = Path(args.bundle)
    return outcome


def _compute(args: argparse.Namespace, folder: Path, place: Place, tolerance: float) -> Validation:
    outcome = validation.validate(folder)
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
        whole_runs.train_again(outcome, outcome.rerun, place)
    return outcome
