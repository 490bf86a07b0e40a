"""The leaderboard's page and its command: one HTML file that loads nothing, and the same numbers in other formats.

What entries say is text of strangers. Templates escape it, scripts only ever take it as text, and a content security
policy lets no script or style run but the page's own, by their hashes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from domainbed_sfp.analysis.render.grids import ABSENT, MISSING, RECONSTRUCTION_NOTE
from domainbed_sfp.analysis.render.html.self_contained import content_policy, packaged_text
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.core.version import __version__
from domainbed_sfp.leaderboard import tracks
from domainbed_sfp.leaderboard.documents.entry_schema import SELECTIONS, TRACKS
from domainbed_sfp.leaderboard.documents.problems import printable
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.site import data, tables, texts
from domainbed_sfp.leaderboard.site.board import BANDS, DENSE, UNKNOWN, Board, board_of
from domainbed_sfp.leaderboard.tiers import NOTES, TIERS

# format -> (its title, the file's name)
FILES: Mapping[str, tuple[str, str]] = {
    "html": ("HTML", "index.html"),
    "markdown": ("Markdown", "leaderboard.md"),
    "latex": ("LaTeX", "leaderboard.tex"),
    "csv": ("CSV", "leaderboard.csv"),
    "json": ("JSON", "leaderboard.json"),
}


def run(args: argparse.Namespace) -> int:
    """The action `build`. Raises UserError for an unknown format, an entry that is none, a folder that cannot be
    written."""
    chosen = list(dict.fromkeys(args.format or FILES))
    for name in chosen:
        if name not in FILES:
            raise unknown_name("--format", name, FILES)
    if args.check:
        return _check(args, chosen)
    for path in build(args.entries_dir, args.output_dir, chosen):
        print(f"wrote {path}")
    return 0


def _check(args: argparse.Namespace, formats: Sequence[str]) -> int:
    """`build --check`: 1 where an entry is not what its bundle gives, or a file not what the entries give."""
    # Imported here because a page is built without computing anything.
    from domainbed_sfp.leaderboard.entries.rebuilding import check_entries
    from domainbed_sfp.leaderboard.rerun.place import place_of

    checked = check_entries(args.entries_dir, place_of(args), args.recompute)
    lines = [problem.line() for problem in checked.problems]
    for path, text in contents(args.entries_dir, args.output_dir, formats).items():
        if not path.is_file() or path.read_bytes() != text.encode():
            found = "another" if path.is_file() else "no file"
            lines.append(f"{path}: expected what the entries give, found {found}; `leaderboard build` makes it")
    print("\n".join([*lines, f"{len(checked.rebuilt)} entries rebuilt from their bundles"]))
    if checked.alone:
        print(f"{len(checked.alone)} without a bundle, checked for consistency alone: {', '.join(checked.alone)}")
    return 1 if lines else 0


def build(entries_dir: str | Path, output_dir: str | Path, formats: Sequence[str]) -> list[Path]:
    """Renders the entries under `entries_dir` into `output_dir`, in FILES's formats; the files written.

    The same entries give the same bytes. A folder without entries gives a page that says so; one that is not there is
    a UserError.
    """
    found = contents(entries_dir, output_dir, formats)
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        for path, text in found.items():
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"--output_dir {str(output_dir)!r} cannot be written: {error.strerror}") from error
    return list(found)


def contents(entries_dir: str | Path, output_dir: str | Path, formats: Sequence[str]) -> dict[Path, str]:
    """What `build` writes, by path."""
    if not Path(entries_dir).is_dir():
        raise UserError(f"--entries_dir {str(entries_dir)!r} is no folder; `leaderboard add` makes one")
    board = board_of(store.read_all(entries_dir, history=True))
    renderers: Mapping[str, Callable[[Board], str]] = {
        "html": lambda board: html_text(board, [FILES[name] for name in formats if name != "html"]),
        "markdown": tables.markdown_text,
        "latex": tables.latex_text,
        "csv": data.csv_text,
        "json": data.json_text,
    }
    return {Path(output_dir) / FILES[name][1]: renderers[name](board) for name in formats}


def html_text(board: Board, siblings: Sequence[tuple[str, str]] = ()) -> str:
    """The page. `siblings` are (title, file name) of other formats in its folder, to be linked."""
    # Imported here because no other format needs it.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = (packaged_text(__package__, f"page.{suffix}") for suffix in ("css", "js"))
    policy = content_policy(style, script)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(printable=printable, number=_number, seeds=_seeds)
    return environment.from_string(packaged_text(__package__, "page.html")).render(
        board=board,
        datasets=list(dict.fromkeys(ranking.dataset for ranking in board.rankings)),
        filters=_filters(board),
        siblings=siblings,
        notes=tables.NOTES,
        tiers=TIERS[::-1],
        tier_notes=NOTES,
        trials_of_closed=tracks.TRIALS,
        reconstruction_note=RECONSTRUCTION_NOTE,
        bitops=any(map(texts.has_bitops, board.rankings)),
        absent=ABSENT,
        missing=MISSING,
        accuracy=texts.accuracy_text,
        average=texts.average_text,
        worst=texts.worst_text,
        trials=texts.trials_text,
        sparsity=texts.sparsity_text,
        part=texts.part_text,
        unverified_axes=texts.unverified_axes,
        mark=texts.marked_if_unverified,
        bitops_text=texts.bitops_text,
        has_bitops=texts.has_bitops,
        label=texts.label_of,
        protocol_of=texts.shared_protocol,
        protocol_text=texts.protocol_text,
        differs=lambda ranking, text: len(set(map(text, ranking.lines))) > 1,
        notes_of=tables.notes_of,
        version=__version__,
        # Ours, and free of what would end their elements; the policy names their bytes.
        policy=policy,
        style=Markup(style),
        script=Markup(script),
    )


def _filters(board: Board) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(name, title, [(value, text)]) of every filter; only values that occur."""
    lines = [line for ranking in board.rankings for line in ranking.lines]
    rules = dict.fromkeys((ranking.rule.key, ranking.rule.title) for ranking in board.rankings)
    bands = {line.band for line in lines}
    found = {entry.tier for entry in board.entries}
    tracks = {entry.track for entry in board.entries}
    kinds = {ranking.transductive for ranking in board.rankings}
    return [
        ("dataset", "Data set", _same(dict.fromkeys(ranking.dataset for ranking in board.rankings))),
        ("rule", "Model selection", sorted(rules, key=lambda rule: SELECTIONS.index(rule[0]))),
        ("track", "Track", _same(name for name in TRACKS if name in tracks)),
        (
            "transductive",
            "Test images in training",
            [(value, text) for kind, value, text in _KINDS if kind in kinds],
        ),
        ("family", "Family", _same(sorted({line.family for line in lines}))),
        ("band", "Sparsity", _same(name for name in (DENSE, *BANDS, UNKNOWN) if name in bands)),
        ("tier", "Tier", _same(name for name in TIERS if name in found)),
    ]


_KINDS = ((False, "no", "never seen"), (True, "yes", "unlabelled (transductive)"))


def _same(values: Iterable[str]) -> list[tuple[str, str]]:
    return [(value, value) for value in values]


def _number(value: float) -> str:
    """A cost with all its digits: counts in groups, fractions as they are."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"


def _seeds(values: Sequence[int]) -> str:
    """Seeds as ranges: "0-2, 5"."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
