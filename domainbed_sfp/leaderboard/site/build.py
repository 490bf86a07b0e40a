"""The action `leaderboard build`: files of the board from the entries, or whether those there are what entries give."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.leaderboard.entries import store
from domainbed_sfp.leaderboard.site import data, page, tables
from domainbed_sfp.leaderboard.site.board import Board, board_of

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
        "html": lambda board: page.html_text(board, [FILES[name] for name in formats if name != "html"]),
        "markdown": tables.markdown_text,
        "latex": tables.latex_text,
        "csv": data.csv_text,
        "json": data.json_text,
    }
    return {Path(output_dir) / FILES[name][1]: renderers[name](board) for name in formats}
