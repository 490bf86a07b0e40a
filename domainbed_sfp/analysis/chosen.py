"""Which run, checkpoint and hparams stand behind each number of the tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from .data_formats import json_text
from .display import Grid, Shown, daggered
from .html_page import html_of
from .latex import latex_of
from .markdown import markdown_of
from .selection import Choice
from .tables import Report, Row, Table, chosen_hparams

_HEADER = ("Algorithm", "Test", "Trial", "Hparams seed", "Step", "Validation", "Accuracy", "Searched hparams", "Run")


def _choices(table: Table) -> Iterator[tuple[Row, str, int, Choice]]:
    for row in table.rows:
        for environment, cell in zip(table.environments, row.cells):
            for trial, choice in cell.choices if cell else ():
                yield row, environment, trial, choice


def _text(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def _grids(report: Report) -> list[Grid]:
    grids = []
    for table in report.tables:
        rows = tuple(
            tuple(
                Shown(text)
                for text in (
                    daggered(row.label, row.standing),
                    environment,
                    str(trial),
                    str(choice.run.hparams_seed),
                    str(choice.run.steps[choice.checkpoint]),
                    f"{100 * choice.validation:.1f}",
                    f"{100 * choice.test:.1f}",
                    _text(chosen_hparams(row, choice)),
                    choice.run.directory,
                )
            )
            for row, environment, trial, choice in _choices(table)
        )
        title = f"{table.dataset}, chosen by: {table.rule.title}"
        grids.append(Grid(f"{table.dataset}-{table.rule.key}-chosen", title, _HEADER, rows, table.protocol.line(), ()))
    return grids


def _notes(report: Report) -> list[str]:
    return [
        "Validation: the accuracy, in percent, that the run and its checkpoint were chosen by. Searched hparams: those "
        "that differ between the runs of the row.",
        *report.notes,
    ]


def _csv(report: Report) -> str:
    """A line for every trial of every cell; accuracies are percent, `hparam.NAME` columns hold what was searched."""
    names = sorted({name for table in report.tables for row in table.rows for name in row.searched})
    fields = ["dataset", "selection", "algorithm", "label", "environment", "trial_seed", "hparams_seed", "step"]
    fields += ["validation_accuracy", "accuracy", "run", *(f"hparam.{name}" for name in names)]
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    for table in report.tables:
        for row, environment, trial, choice in _choices(table):
            writer.writerow(
                {
                    "dataset": table.dataset,
                    "selection": table.rule.key,
                    "algorithm": row.algorithm,
                    "label": row.label,
                    "environment": environment,
                    "trial_seed": trial,
                    "hparams_seed": choice.run.hparams_seed,
                    "step": choice.run.steps[choice.checkpoint],
                    "validation_accuracy": 100 * choice.validation,
                    "accuracy": 100 * choice.test,
                    "run": choice.run.directory,
                    **{f"hparam.{name}": value for name, value in chosen_hparams(row, choice).items()},
                }
            )
    return out.getvalue()


CHOSEN_FORMATS = {
    "markdown": lambda report: markdown_of(_grids(report), _notes(report)),
    "latex": lambda report: latex_of(_grids(report), _notes(report)),
    "html": lambda report: html_of("Chosen runs", _grids(report), _notes(report)),
    "csv": _csv,
    "json": json_text,
}
