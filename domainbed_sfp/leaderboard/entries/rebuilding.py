"""`leaderboard build --check`: entries are rebuilt from their bundles, not believed, and so is the page from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle import archives
from domainbed_sfp.leaderboard.documents.entry import Entry, as_json
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.entries.making import entries_of
from domainbed_sfp.leaderboard.rerun import whole_runs
from domainbed_sfp.leaderboard.rerun.first_steps import check_first_steps
from domainbed_sfp.leaderboard.rerun.models import check_models
from domainbed_sfp.leaderboard.rerun.place import Place
from domainbed_sfp.leaderboard.tiers import SELF_REPORTED
from domainbed_sfp.leaderboard.validation.outcomes import Rerun
from domainbed_sfp.leaderboard.validation.submission import differences

# Of no bundle: when an entry was added, and by what it was replaced.
OF_THE_BOARD = ("date", "superseded_by")


@dataclass
class Checked:
    """What came of it. rebuilt and alone: entries with a bundle, and those that nothing but consistency speaks for."""

    problems: list[Problem] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)


def check_entries(entries_dir: str | Path, place: Place, recompute: bool) -> Checked:
    """Rebuilds every entry from its bundle. With `recompute` the first steps, the models and the reruns are computed
    again, too; without it, that they were is believed where the bundle and the draw allow it."""
    found = Checked()
    for path, entry in store.read_files(entries_dir).items():
        label = f"{entry.dataset}/{path.name}"
        if entry.archive is None:
            found.alone.append(label)
            continue
        where = entry.archive if "://" in entry.archive else str(Path(entries_dir) / entry.archive)
        try:
            with archives.opened(where) as folder:
                found.problems += _differing(path, entry, folder, place, recompute)
        except UserError as error:
            found.problems.append(Problem(str(path), "archive", "the entry's bundle", str(error)))
        found.rebuilt.append(label)
    return found


def _differing(path: Path, entry: Entry, folder: Path, place: Place, recompute: bool) -> Iterator[Problem]:
    outcome = validation.validate(folder)
    if outcome.tier is not None and outcome.sums == entry.bundle and recompute:
        if outcome.tree is not None:
            check_models(outcome, outcome.tree, place)
        check_first_steps(outcome, place)
        if entry.rerun is not None and outcome.tier is not None:
            again = entry.rerun
            outcome.rerun = Rerun(again["seed"], again["per_environment"], again["tolerance"])
            whole_runs.train_again(outcome, outcome.rerun, place)
    if outcome.problems:
        for problem in outcome.problems:
            yield replace(problem, file=f"{path}, {entry.archive}: {problem.file}")
        return
    made = {one.dataset: one for one in entries_of(outcome, entry.archive)}
    if entry.dataset not in made:
        yield Problem(str(path), "dataset", f"one of the bundle's, {', '.join(made)}", shown(entry.dataset))
        return
    expected = made[entry.dataset]
    if not recompute:
        # Where something could not be checked nothing else counts.
        tier = expected.tier if SELF_REPORTED in (expected.tier, entry.tier) else entry.tier
        unverified = () if entry.models else expected.unverified
        expected = replace(
            expected, tier=tier, step_0=entry.step_0, models=entry.models, rerun=entry.rerun, unverified=unverified
        )
    expected = replace(expected, **{name: getattr(entry, name) for name in OF_THE_BOARD})
    for where, value, told in differences(as_json(expected), as_json(entry)):
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
        yield Problem(str(path), name, f"{shown(value)}, as rebuilt from {entry.archive}", shown(told))
