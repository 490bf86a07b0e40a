"""Whether a bundle's numbers follow from its records, and its records from the protocol.

Everything is recomputed: sums, grid, seeds, hparams drawn, steps, what accuracies the splits allow, masks, selection,
means and errors. Each deviation becomes a `Problem`; one does not hide the next. What records alone cannot show is
whether they were computed as they say: `rerun` is for that.

A check is a generator of problems over one `Bundle`; `CHECKS` are all of them, in order. One that needs what the checks
before it have not found says nothing.
"""

from __future__ import annotations

from pathlib import Path

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard.bundle.layout import SUBMISSION, SUMS
from domainbed_sfp.leaderboard.bundle.tree import Tree, read_tree
from domainbed_sfp.leaderboard.documents.problems import MOST_PROBLEMS
from domainbed_sfp.leaderboard.validation.compression import check_same_final_step
from domainbed_sfp.leaderboard.validation.context import Bundle, Check
from domainbed_sfp.leaderboard.validation.costs import check_costs
from domainbed_sfp.leaderboard.validation.grid import (
    check_copies,
    check_file_names,
    check_grid,
    check_jobs,
    check_method,
)
from domainbed_sfp.leaderboard.validation.models import check_models
from domainbed_sfp.leaderboard.validation.reading import check_sums, read_records, read_submission
from domainbed_sfp.leaderboard.validation.report import Validation, json_of, refusal_json, text_of
from domainbed_sfp.leaderboard.validation.runs import check_runs
from domainbed_sfp.leaderboard.validation.signature import check_signature
from domainbed_sfp.leaderboard.validation.submission import check_submission
from domainbed_sfp.runs.layout import RESULTS

__all__ = ["CHECKS", "Bundle", "Validation", "json_of", "refusal_json", "text_of", "validate"]

# So many problems of a bundle are told: past them the list would be the largest thing in memory.
MOST_TOLD = 50 * MOST_PROBLEMS

CHECKS: tuple[Check, ...] = (
    check_sums,
    read_submission,
    read_records,
    check_file_names,
    check_runs,
    check_same_final_step,
    check_jobs,
    check_copies,
    check_method,
    check_grid,
    check_submission,
    check_costs,
    check_models,
    check_signature,
)


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
        return _check(root, read_tree(root))
    except OSError as error:
        raise UserError(f"bundle {str(folder)!r} cannot be read: {error.strerror or error}") from error


def _check(root: Path, tree: Tree) -> Validation:
    bundle = Bundle(tree)
    problems = dict.fromkeys(tree.problems)
    for check in () if tree.is_refused else CHECKS:
        for problem in check(bundle):  # to its end, whatever is told: the next one needs what this one finds
            if len(problems) < MOST_TOLD:
                problems[problem] = None
        if bundle.is_excessive:
            break
    return Validation(
        root,
        list(problems),
        unchecked=bundle.unchecked,
        unverified=bundle.unverified,
        submission=bundle.document,
        runs=bundle.runs,
        sums=tree.sums.get(SUMS, ""),
        tree=tree,
    )
