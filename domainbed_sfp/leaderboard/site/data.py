"""The board for programs: CSV and JSON, unrounded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from domainbed_sfp.analysis.render.csv_files import csv_of_lines
from domainbed_sfp.core.version import __version__
from domainbed_sfp.leaderboard.documents.entry import as_json
from domainbed_sfp.leaderboard.site.board import Board, Line, Ranking
from domainbed_sfp.runs.records import COST_FIELDS

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
