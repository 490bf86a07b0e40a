"""Unrounded numbers for programs: CSV, one line a cell, and JSON, with the choice of every trial."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from domainbed_sfp.analysis.render.csv_files import csv_of_lines
from domainbed_sfp.analysis.rows import Cell, Row
from domainbed_sfp.analysis.tables import Report, Table
from domainbed_sfp.core.version import __version__
from domainbed_sfp.runs.records import COST_FIELDS

_COLUMNS = (
    "dataset",
    "selection",
    "algorithm",
    "label",
    "environment",
    "accuracy",
    "std_err",
    "trials",
    *COST_FIELDS,
    "standing",
    "source",
)


def csv_text(report: Report) -> str:
    """Long form: a line for every environment of every row and, as environment "average", "worst" and
    "in-domain", for these.

    Accuracies and standard errors are percent; a missing value is empty.
    """
    return csv_of_lines(_COLUMNS, _lines(report))


def _lines(report: Report) -> Iterator[dict[str, Any]]:
    for table in report.tables:
        for row in table.rows:
            cells = [
                *zip(table.environments, row.cells),
                ("average", row.average),
                ("worst", _worst(row)),
                ("in-domain", _in_domain(row)),
            ]
            for environment, cell in cells:
                yield {
                    **place_of(table, row, environment),
                    **_numbers(cell),
                    **row.costs,
                    "standing": row.standing,
                    "source": row.published.source if row.published else "",
                }


def json_text(report: Report) -> str:
    """Everything the report holds: protocol, notes, cells, and per trial the run, step, hparams seed and
    searched hparams chosen."""
    document = {
        "format": 1,
        "package": f"domainbed_sfp {__version__}",
        "unit": "percent",
        "tables": [_table(table) for table in report.tables],
        "averages": [
            {
                "selection": averages.rule.key,
                "datasets": list(averages.datasets),
                "notes": list(averages.notes),
                "rows": [
                    {
                        "label": row.label,
                        "standing": row.standing,
                        "cells": [_numbers(cell) for cell in row.cells],
                        "average": row.mean,
                    }
                    for row in averages.rows
                ],
            }
            for averages in report.averages
        ],
        "notes": list(report.notes),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _table(table: Table) -> dict[str, Any]:
    return {
        "dataset": table.dataset,
        "selection": table.rule.key,
        "environments": list(table.names or table.environments),
        "protocol": table.protocol.as_dict(),
        "notes": list(table.notes),
        "rows": [_row(row, table) for row in table.rows],
    }


def _row(row: Row, table: Table) -> dict[str, Any]:
    environments = table.environments
    cells = [
        {"environment": environment, "test_env": env, **_numbers(cell), "choices": choices_of(row, cell)}
        for env, (environment, cell) in enumerate(zip(environments, row.cells))
    ]
    for source, one in zip(table.sources, cells):
        trained_on = [name for env, name in enumerate(table.names) if env not in source.test_envs]
        one.update(environment=table.names[source.env], test_env=source.env, trained_on=trained_on)
    return {
        "label": row.label,
        "algorithm": row.algorithm,
        "settings": {name: json.loads(value) for name, value in row.settings.items()},
        "standing": row.standing,
        "source": row.published.source if row.published else None,
        "backbone": row.published.backbone if row.published else None,
        "cells": cells,
        "average": _numbers(row.average),
        "worst": {
            "environment": None if row.worst is None else environments[row.worst],
            **_numbers(_worst(row)),
        },
        "in_domain": row.in_domain,
        "costs": row.costs,
    }


def place_of(table: Table, row: Row, environment: str) -> dict[str, str]:
    """The columns of a CSV file that say which number of which table a line is about."""
    return {
        "dataset": table.dataset,
        "selection": table.rule.key,
        "algorithm": row.algorithm,
        "label": row.label,
        "environment": environment,
    }


def choices_of(row: Row, cell: Cell | None) -> list[dict[str, Any]]:
    """What was chosen for each trial of a cell; accuracies in percent."""
    return [
        {
            "trial_seed": trial,
            "accuracy": 100 * choice.test,
            "validation_accuracy": 100 * choice.validation,
            "hparams_seed": choice.run.hparams_seed,
            "hparams": {name: choice.run.hparams[name] for name in row.searched if name in choice.run.hparams},
            "step": choice.run.steps[choice.checkpoint],
            "run": choice.run.directory,
        }
        for trial, choice in (cell.choices if cell else ())
    ]


def _numbers(cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {"accuracy": None, "std_err": None, "trials": 0}
    return {"accuracy": cell.accuracy, "std_err": cell.std_err, "trials": cell.trials}


def _worst(row: Row) -> Cell | None:
    return None if row.worst is None else row.cells[row.worst]


def _in_domain(row: Row) -> Cell | None:
    return None if row.in_domain is None else Cell(row.in_domain, None, None)
