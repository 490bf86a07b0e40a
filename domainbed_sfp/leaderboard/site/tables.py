"""The leaderboard as Markdown and LaTeX. Texts of entries come from strangers: none is taken as markup."""

from __future__ import annotations

import re
from dataclasses import replace

from domainbed_sfp.analysis.render.grids import (
    ABSENT,
    BEST,
    MISSING,
    RECONSTRUCTION_NOTE,
    SECOND,
    Grid,
    Shown,
)
from domainbed_sfp.analysis.render.latex import latex_of
from domainbed_sfp.analysis.render.markdown import markdown_of
from domainbed_sfp.analysis.rows import RECONSTRUCTION
from domainbed_sfp.leaderboard import tiers
from domainbed_sfp.leaderboard.documents.problems import printable
from domainbed_sfp.leaderboard.site.board import Board, Ranking
from domainbed_sfp.leaderboard.site.texts import (
    UNVERIFIED,
    accuracy_text,
    average_text,
    bitops_text,
    has_bitops,
    label_of,
    part_text,
    protocol_text,
    shared_protocol,
    sparsity_text,
    trials_text,
    worst_text,
)

UNVERIFIED_NOTE = (
    f"{UNVERIFIED} not recomputed: what the runs say of themselves. The records do not determine it, as with the "
    "BitOPs of learned bit-widths."
)

NOTES = (
    "Accuracy in percent on held-out environments ± standard error over trials (sample standard deviation / sqrt(n)); "
    f"{ABSENT} where one trial has none.",
    "Ranks follow the average as shown. Tiers are ranked apart, the highest first: nothing that was checked less "
    "stands above what was checked more. So are transductive methods, which see unlabelled images of the test "
    "environment, and the open track.",
    f"Every accuracy of a verified entry follows from its records, and every cost that is not marked {UNVERIFIED}; "
    "published numbers that nobody measured here are not in it.",
)


def markdown_text(board: Board) -> str:
    """A table a ranking."""
    return "# Leaderboard\n\n" + markdown_of([_inert(grid) for grid in map(grid_of, board.rankings)], _notes(board))


def latex_text(board: Board) -> str:
    """A `table` a ranking; needs booktabs."""
    text = latex_of(list(map(grid_of, board.rankings)), _notes(board))
    return text.replace(UNVERIFIED, "$^\\ddagger$")


def grid_of(ranking: Ranking) -> Grid:
    """A ranking as the tables of `collect` draw one, its environments as columns."""
    lines = ranking.lines

    def marked(texts: list[str], values: list[float | None]) -> list[Shown]:
        return _marked(texts, values) if ranking.is_verified else list(map(Shown, texts))

    columns: list[tuple[str, list[Shown]]] = [
        ("Method", [Shown(printable(label_of(line))) for line in lines]),
        ("Rank", [Shown(ABSENT if line.rank is None else str(line.rank)) for line in lines]),
    ]
    for environment in ranking.environments:
        cells = [line.cell(environment) for line in lines]
        texts = [MISSING if cell is None else accuracy_text(cell.accuracy, cell.std_err) for cell in cells]
        columns.append(
            (printable(environment), marked(texts, [None if cell is None else cell.accuracy for cell in cells]))
        )
    averages = [line.result.average and line.result.average[0] for line in lines]
    worst = [line.result.worst and line.result.worst[1] for line in lines]
    columns += [
        ("Average", marked([average_text(line) for line in lines], averages)),
        ("Worst", marked([worst_text(line) for line in lines], worst)),
        ("Trials", [Shown(trials_text(line)) for line in lines]),
        ("Sparsity", [Shown(sparsity_text(line)) for line in lines]),
        ("Parameters left", [Shown(part_text(line, "surviving_parameters", "parameters")) for line in lines]),
        ("MACs left", [Shown(part_text(line, "macs", "dense_macs")) for line in lines]),
    ]
    if has_bitops(ranking):
        columns.append(("BitOPs", [Shown(bitops_text(line)) for line in lines]))
    columns.append(("Tier", [Shown(line.entry.tier) for line in lines]))
    if "backbone" in shared_protocol(ranking)[1]:
        columns.append(("Backbone", [Shown(printable(line.entry.protocol["backbone"])) for line in lines]))
    kind = ("-transductive" if ranking.transductive else "") + f"-{ranking.tier}"
    digest = f"-{ranking.data_digest}" if ranking.data_digest else ""
    name = f"{ranking.dataset}{digest}-{ranking.rule.key}-{ranking.track}{kind}"
    return Grid(
        re.sub("[^A-Za-z0-9-]", "-", name),
        printable(ranking.title),
        tuple(header for header, _ in columns),
        tuple(zip(*(shown for _, shown in columns))),
        protocol_text(ranking),
        notes_of(ranking),
    )


def notes_of(ranking: Ranking) -> tuple[str, ...]:
    """What has to be said about this ranking alone."""
    notes = []
    checked, unchecked = tiers.NOTES[ranking.tier]
    notes.append(f"{ranking.tier.capitalize()}. Checked: {checked}. Not checked: {unchecked}.")
    if any(cell is None for line in ranking.lines for cell in map(line.cell, ranking.environments)):
        notes.append(f"{MISSING}: not tested. No average is taken over fewer environments, and no rank given.")
    if any(line.entry.standing == RECONSTRUCTION for line in ranking.lines):
        notes.append(RECONSTRUCTION_NOTE)
    if any(set(line.entry.unverified) & set(line.result.costs) for line in ranking.lines):
        notes.append(UNVERIFIED_NOTE)
    return tuple(notes)


def _notes(board: Board) -> tuple[str, ...]:
    return NOTES if board.entries else ("There are no entries yet.",)


def _marked(texts: list[str], values: list[float | None]) -> list[Shown]:
    """The best and, of three or more, the second are marked, as rounded."""
    rounded = [None if value is None else round(value, 1) for value in values]
    found = sorted({value for value in rounded if value is not None}, reverse=True)
    filled = sum(value is not None for value in rounded)
    emphasis = dict(zip(found, (BEST, SECOND) if filled >= 3 else (BEST,) if filled == 2 else ()))
    return [Shown(text, "" if value is None else emphasis.get(value, "")) for text, value in zip(texts, rounded)]


def _inert(grid: Grid) -> Grid:
    """A grid whose texts are no Markdown and no HTML: no emphasis, no code, no formulas, no links, not even bare ones.
    `markdown_of` itself escapes what would end a cell."""

    def plain(text: str) -> str:
        # An underscore within a word is one everywhere; elsewhere it may begin emphasis.
        text = re.sub(r"([\\`*\[\]<>&$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
        return re.sub(r"(:(?=//)|(?<=\bwww)\.)", r"\\\1", text, flags=re.IGNORECASE)

    return replace(
        grid,
        title=plain(grid.title),
        header=tuple(map(plain, grid.header)),
        rows=tuple(tuple(replace(shown, text=plain(shown.text)) for shown in row) for row in grid.rows),
        protocol=plain(grid.protocol),
    )
