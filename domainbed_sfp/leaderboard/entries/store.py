"""The folder of entries: `<folder>/<dataset>/<Name>.json`, and what an entry must be to take its place there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.leaderboard.bundle.plain_files import open_plain
from domainbed_sfp.leaderboard.documents.entry import Entry, as_json, from_json, slug, text_of
from domainbed_sfp.leaderboard.documents.parsing import parse
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.entries import consistency
from domainbed_sfp.leaderboard.tiers import RERUN_VERIFIED, TIERS

# Larger files are no entries.
LARGEST_FILE = 2**22
# Of a protocol: numbers that were measured under another one do not compare, and do not take each other's place.
COMPARED = (
    "steps", "checkpoint_freq", "backbone", "weights", "image_size", "test_envs", "data_digest", "holdout_fraction",
    "precision", "task",
)  # fmt: skip
# More of them is a better protocol.
SEEDS = ("hparams_seeds", "trial_seeds")


def read(path: str | Path) -> Entry:
    """One entry. Raises UserError, naming file and field, where it is none."""
    try:
        with open_plain(path) as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise UserError(f"{path}: expected an entry of at most {LARGEST_FILE:,} bytes")
        document = parse(data)
        entry = from_json(document, str(path))
        for problem in consistency.problems(document, str(path)):
            raise UserError(problem.line())
        return entry
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON document ({error})") from error


def read_all(folder: str | Path, history: bool = False) -> list[Entry]:
    """The current entries under `folder`, by data set and name; with `history` the superseded ones too, each after
    the entry that is current. A folder that is not there holds none. Raises UserError as `read_files` does."""
    kept = [entry for entry in read_files(folder).values() if history or entry.superseded_by is None]
    return sorted(kept, key=lambda entry: (entry.dataset, entry.name, entry.superseded_by is not None, entry.date))


def read_files(folder: str | Path) -> dict[Path, Entry]:
    """Every file of the folder, current and superseded, by its path.

    Raises UserError, naming file and field, for a file that is no entry, contradicts itself or is not the one that its
    place and name say; and for two entries that say they are of one bundle, or of the same runs.
    """
    found = {path: _at_its_place(path, read(path)) for path in sorted(Path(folder).glob("*/*.json"))}
    for problem in _between(found):
        raise UserError(problem.line())
    return found


def _between(found: Mapping[Path, Entry]) -> Iterator[Problem]:
    """What entries say that cannot be because of others."""
    names: dict[tuple[str, str], Path] = {}
    bundles: dict[str, Path] = {}
    for path, entry in found.items():
        for kind, digest in (("bundle", entry.bundle), *(("runs", run) for run in entry.runs)):
            first = names.setdefault((entry.dataset, digest), path)
            if found[first].name != entry.name:
                what = "a bundle" if kind == "bundle" else "runs"
                yield Problem(str(path), kind, f"{what} of its own, not that of {first}", digest)
        other = found[bundles.setdefault(entry.bundle, path)]
        for field in ("name", "algorithm", "settings", "package", "commit", "author"):
            if getattr(other, field) != getattr(entry, field):
                words = f"{shown(getattr(other, field))}, as {bundles[entry.bundle]} has of the same bundle"
                yield Problem(str(path), field, words, shown(getattr(entry, field)))
    for path, entry in found.items():
        after = _successor(path, found)
        if after is not None and entry.superseded_by != found[after].bundle:
            yield Problem(str(path), "superseded_by", f"the bundle of {after}", shown(entry.superseded_by))
        if after is not None and entry.date > found[after].date:
            yield Problem(str(path), "date", f"no day after {found[after].date}, that of {after}", shown(entry.date))


def _successor(path: Path, found: Mapping[Path, Entry]) -> Path | None:
    """The file that took the place of a numbered one, None of the current one or where it is not there."""
    if found[path].superseded_by is None:
        return None
    stem, number = path.stem.rsplit(".", 1)
    following = path.with_name(f"{stem}.{int(number) + 1}.json")
    last = path.with_name(f"{stem}.json")
    return following if following in found else last if last in found else None


def _at_its_place(path: Path, entry: Entry) -> Entry:
    if path.parent.name != slug(entry.dataset):
        problem = Problem(str(path), "dataset", f"that of the folder, {shown(path.parent.name)}", shown(entry.dataset))
        raise UserError(problem.line())
    number = path.name.removeprefix(f"{slug(entry.name)}.").removesuffix("json")
    if re.fullmatch(r"(\d+\.)?", number) is None or not path.name.startswith(f"{slug(entry.name)}."):
        raise UserError(Problem(str(path), "name", f"one whose file is {path.name}", shown(entry.name)).line())
    if bool(number) != (entry.superseded_by is not None):
        words = "the bundle that took its place" if number else "null: a file without number is the current entry"
        raise UserError(Problem(str(path), "superseded_by", words, shown(entry.superseded_by)).line())
    return entry


def write(folder: str | Path, entry: Entry, rerun_command: str = "leaderboard add BUNDLE --rerun N") -> Path:
    """Writes an entry as the current one of its name; the one before it is kept as `<Name>.<k>.json`. `rerun_command`
    is told where a rerun would make the difference.

    Raises UserError where the entry contradicts itself; where another name has its bundle, its runs or a name that
    differs in nothing but capitals; where the folder cannot be written; and where the entry there does not give way:
    one of another algorithm or protocol (it would vanish behind a number that cannot be compared with it), of a higher
    tier, of more draws or trials, or of the same tier where this one has neither more of them nor the same author's
    signature.
    """
    path = Path(folder) / slug(entry.dataset) / entry.file_name
    text = text_of(entry)
    for problem in consistency.problems(as_json(entry), entry.name):
        raise UserError(problem.line())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_taken(entry, path)
        if path.exists():
            before = read(path)
            _refuse_another(before, entry, path, rerun_command)
            number = 1
            while (kept := path.with_name(f"{path.stem}.{number}.json")).exists():
                number += 1
            write_atomically(kept, text_of(replace(before, superseded_by=entry.bundle)))
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _refuse_taken(entry: Entry, path: Path) -> None:
    for other in sorted(path.parent.glob("*.json")):
        if other.name != path.name and other.name.lower() == path.name.lower():
            raise UserError(
                f"{path}: {other.name} is there already, and readers cannot tell the names apart; give yours "
                "another with `submit --name`"
            )
        known = read(other)
        if known.name == entry.name:
            continue
        if known.bundle == entry.bundle:
            raise UserError(f"{path}: this bundle is there already, as {other.name}; one bundle makes one entry")
        if shared := set(known.runs) & set(entry.runs):
            raise UserError(
                f"{path}: {len(shared)} of its {len(entry.runs)} runs are those of {other.name}, record by record; "
                "the same runs are not listed under two names"
            )


def _refuse_another(before: Entry, entry: Entry, path: Path, rerun_command: str) -> None:
    is_lower = TIERS.index(entry.tier) < TIERS.index(RERUN_VERIFIED)
    way = f"; `{rerun_command}` trains runs again and raises it to {RERUN_VERIFIED} or higher" if is_lower else ""
    if (before.bundle, before.tier) == (entry.bundle, entry.tier):
        raise UserError(f"{path}: this bundle is there already, at tier {entry.tier}{way}")
    named: dict[str, tuple[Any, Any]] = {
        field: (getattr(before, field), getattr(entry, field)) for field in ("name", "algorithm", "settings")
    }
    named |= {f"protocol.{field}": (before.protocol[field], entry.protocol[field]) for field in COMPARED}
    for field, (there, here) in named.items():
        if there != here:
            raise UserError(
                f"{path}: an entry of this name is there already, with another {field} ({shown(there)} there, "
                f"{shown(here)} here); give yours a name of its own with `submit --name`"
            )
    if TIERS.index(entry.tier) < TIERS.index(before.tier):
        raise UserError(f"{path}: the entry there is {before.tier}, this one only {entry.tier}{way}")
    counts = {field: (len(before.protocol[field]), len(entry.protocol[field])) for field in SEEDS}
    for field, (there, here) in counts.items():
        if here < there:
            raise UserError(
                f"{path}: the entry there has {there} {field}, this one only {here}; give yours a name of its own with "
                "`submit --name`"
            )
    is_better = any(here > there for there, here in counts.values())
    is_same_author = before.author is not None and before.author == entry.author
    if before.tier == entry.tier and before.bundle != entry.bundle and not (is_better or is_same_author):
        raise UserError(
            f"{path}: the entry there is {before.tier}, too, with as many trials and hparams draws; it gives way to a "
            f"bundle with more of them, or signed with its author's key (`submit --author_key`){way}"
        )
