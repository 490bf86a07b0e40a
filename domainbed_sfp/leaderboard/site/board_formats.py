"""The leaderboard as Markdown, LaTeX, CSV and JSON. Texts of entries come from strangers: none is taken as markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from domainbed_sfp.analysis.render.csv_files import csv_of_lines
from domainbed_sfp.analysis.render.grids import (
    ABSENT,
    BEST,
    MISSING,
    RECONSTRUCTION_NOTE,
    SECOND,
    Grid,
    Shown,
    daggered,
    magnitude,
)
from domainbed_sfp.analysis.render.latex import latex_of
from domainbed_sfp.analysis.render.markdown import markdown_of
from domainbed_sfp.core.version import __version__
from domainbed_sfp.leaderboard import tiers
from domainbed_sfp.leaderboard.documents.entry import as_json
from domainbed_sfp.leaderboard.documents.problems import printable
from domainbed_sfp.leaderboard.site.board import Board, Line, Ranking
from domainbed_sfp.runs.records import COST_FIELDS

RECONSTRUCTION = "reconstruction"

UNVERIFIED = "\N{DOUBLE DAGGER}"
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

_PROTOCOL = ("backbone", "weights", "image_size", "steps", "checkpoint_freq", "holdout_fraction", "precision", "task")
_COLUMNS = (
    "dataset",
    "data_digest",
    "selection",
    "track",
    "transductive",
    "rank",
    "name",
    "algorithm",
    "settings",
    "family",
    "standing",
    "tier",
    "unverified",
    "environment",
    "accuracy",
    "std_err",
    "trials",
    *COST_FIELDS,
    *_PROTOCOL,
    "bundle",
    "date",
    "package",
    "commit",
)


def label_of(line: Line) -> str:
    """A line's name as readers see it; reconstructions are marked."""
    return daggered(line.entry.name, line.entry.standing)


def accuracy_text(accuracy: float, std_err: float | None) -> str:
    """As the tables of `collect` print it."""
    return f"{accuracy:.1f} ± {ABSENT if std_err is None else format(std_err, '.1f')}"


def average_text(line: Line) -> str:
    """The average over environments."""
    return MISSING if line.result.average is None else accuracy_text(*line.result.average)


def worst_text(line: Line) -> str:
    """The lowest accuracy with its environment."""
    worst = line.result.worst
    return MISSING if worst is None else f"{worst[1]:.1f} ({printable(worst[0])})"


def trials_text(line: Line) -> str:
    """Trials of its cells."""
    counts = sorted({len(cell.trials) for cell in line.result.cells if cell})
    return "-".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else ABSENT


def sparsity_text(line: Line) -> str:
    """The part of the method's own units that is removed."""
    sparsity = line.result.costs.get("sparsity")
    return ABSENT if sparsity is None else marked_if_unverified(f"{100 * sparsity:.1f}%", line, "sparsity")


def part_text(line: Line, left: str, dense: str) -> str:
    """A cost that is left, and its part of the dense one."""
    costs = line.result.costs
    if left not in costs:
        return ABSENT
    part = f" ({100 * costs[left] / costs[dense]:.0f}%)" if costs.get(dense) else ""
    return marked_if_unverified(magnitude(costs[left]) + part, line, left, *([dense] if part else []))


def bitops_text(line: Line) -> str:
    """Its BitOPs."""
    return ABSENT if line.bitops is None else marked_if_unverified(magnitude(line.bitops), line, line.source_of_bitops)


def marked_if_unverified(text: str, line: Line, *names: str) -> str:
    """A number as readers see it: one that nobody recomputed is marked."""
    return f"{text} {UNVERIFIED}" if set(names) & set(line.entry.unverified) else text


def unverified_axes(line: Line) -> list[str]:
    """The axes of the page's plots on which this line's cost was not recomputed."""
    sources = {"macs": "macs", "bitops": line.source_of_bitops, "parameters": "surviving_parameters"}
    return [axis for axis, name in sources.items() if name in line.entry.unverified]


def has_bitops(ranking: Ranking) -> bool:
    """Whether BitOPs tell its lines apart better than MACs: where one of them is quantized."""
    return any("bitops" in line.result.costs for line in ranking.lines)


def shared_protocol(ranking: Ranking) -> tuple[str, list[str]]:
    """What the lines' protocols agree in, as a sentence, and the fields in which they differ."""
    told, differing = [], []
    names: Mapping[str, Callable[[Any], str]] = {
        "steps": "{:,} steps".format,
        "backbone": "backbone {}".format,
        "weights": "weights {}".format,
        "image_size": lambda size: f"{size} px images" if size else "",
        "hparams_seeds": lambda seeds: f"{len(seeds)} hparams draw{'s' * (len(seeds) != 1)}",
        "trial_seeds": lambda seeds: f"{len(seeds)} trial{'s' * (len(seeds) != 1)}",
        "holdout_fraction": "held-out fraction {}".format,
        "precision": "precision {}".format,
        "task": lambda task: "" if task == "domain_generalization" else f"task {task}",
    }
    for name, tell in names.items():
        # Seeds may differ where as many were drawn.
        values = dict.fromkeys(tell(line.entry.protocol[name]) for line in ranking.lines)
        if len(values) > 1:
            differing.append(name)
        else:
            told += [printable(text) for text in values if text]
    return "; ".join(told), differing


def protocol_text(ranking: Ranking) -> str:
    """The protocol of a ranking for readers."""
    told, differing = shared_protocol(ranking)
    words = ", ".join(name.replace("_", " ") for name in differing)
    return f"Protocol: {told}." + (f" The entries differ in: {words}." if differing else "")


# for readers --------------------------------------------------------------------------------------------------------


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


# for programs -------------------------------------------------------------------------------------------------------


def csv_text(board: Board) -> str:
    """Unrounded: a line for every environment of every line of a ranking and, as environment "average" and "worst", for
    these; missing values are empty.

    A text that a spreadsheet would take for a formula (it begins with = + - @, their wide forms, or a control
    character) gets an apostrophe before it; all texts are quoted, because a spreadsheet that divides by semicolons
    would otherwise begin a cell in their midst.
    """
    return csv_of_lines(_COLUMNS, _csv_lines(board), quote_texts=True)


def _csv_lines(board: Board) -> Iterator[dict[str, Any]]:
    for ranking in board.rankings:
        for line in ranking.lines:
            cells: list[tuple[str, tuple[Any, Any, Any]]] = []
            for environment in ranking.environments:
                cell = line.cell(environment)
                cells.append((environment, (cell.accuracy, cell.std_err, len(cell.trials)) if cell else ("", "", 0)))
            average, worst = line.result.average, line.result.worst
            lowest = line.cell(worst[0]) if worst else None
            cells += [
                ("average", (*average, "") if average else ("", "", "")),
                ("worst", (worst[1], lowest.std_err if lowest else "", "") if worst else ("", "", "")),
            ]
            for environment, numbers in cells:
                values = {
                    **_facts(ranking, line),
                    "environment": environment,
                    **dict(zip(("accuracy", "std_err", "trials"), numbers)),
                }
                yield {name: _no_formula(value) for name, value in values.items()}


def json_text(board: Board) -> str:
    """The rankings, which name their entries by `bundle` and `name`; and all entries whole, replaced ones under
    `history`."""
    document = {
        "format": 1,
        "package": f"domainbed_sfp {__version__}",
        "unit": "percent",
        "rankings": [
            {
                "dataset": ranking.dataset,
                "data_digest": ranking.data_digest,
                "selection": ranking.rule.key,
                "track": ranking.track,
                "transductive": ranking.transductive,
                "verified": ranking.is_verified,
                "tier": ranking.tier,
                "environments": list(ranking.environments),
                "rows": [
                    {
                        "rank": line.rank,
                        "name": line.entry.name,
                        "bundle": line.entry.bundle,
                        "family": line.family,
                        "standing": line.entry.standing,
                        "tier": line.entry.tier,
                        "average": as_json(line.entry)["results"][ranking.rule.key]["average"],
                        "worst": as_json(line.entry)["results"][ranking.rule.key]["worst"],
                        "costs": dict(line.result.costs),
                        "unverified": list(line.entry.unverified),
                    }
                    for line in ranking.lines
                ],
            }
            for ranking in board.rankings
        ],
        "entries": [as_json(entry) for entry in board.entries],
        "history": [as_json(entry) for entry in board.history],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _facts(ranking: Ranking, line: Line) -> dict[str, Any]:
    entry = line.entry
    return {
        "dataset": ranking.dataset,
        "data_digest": ranking.data_digest,
        "selection": ranking.rule.key,
        "track": ranking.track,
        "transductive": int(ranking.transductive),
        "rank": line.rank,
        "name": entry.name,
        "algorithm": entry.algorithm,
        "settings": json.dumps(entry.settings, sort_keys=True),
        "family": line.family,
        "standing": entry.standing,
        "tier": entry.tier,
        "unverified": " ".join(entry.unverified),
        **{name: line.result.costs[name] for name in COST_FIELDS if name in line.result.costs},
        **{name: entry.protocol[name] for name in _PROTOCOL},
        "bundle": entry.bundle,
        "date": entry.date,
        "package": entry.package,
        "commit": entry.commit,
    }


def _no_formula(value: Any) -> Any:
    is_formula = isinstance(value, str) and re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\x00-\x1f]", value)
    return f"'{value}" if is_formula else value
