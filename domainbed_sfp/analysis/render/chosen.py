"""Which run, checkpoint and hparams stand behind each number of the tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from domainbed_sfp.analysis.render.csv_files import csv_of_lines
from domainbed_sfp.analysis.render.data import choices_of, json_text, place_of
from domainbed_sfp.analysis.render.grids import Grid, Shown, daggered
from domainbed_sfp.analysis.render.latex import latex_of
from domainbed_sfp.analysis.render.markdown import markdown_of
from domainbed_sfp.analysis.rows import Row
from domainbed_sfp.analysis.tables import Report, Table

_HEADER = ("Algorithm", "Test", "Trial", "Hparams seed", "Step", "Validation", "Accuracy", "Searched hparams", "Run")

_PLACE = ("dataset", "selection", "algorithm", "label", "environment")
_CHOICE = ("trial_seed", "hparams_seed", "step", "validation_accuracy", "accuracy", "run")


def _choices(table: Table) -> Iterator[tuple[Row, str, dict[str, Any]]]:
    for row in table.rows:
        for environment, cell in zip(table.environments, row.cells):
            for choice in choices_of(row, cell):
                yield row, environment, choice


def _settings(values: dict[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def grid_of(table: Table) -> Grid:
    """The choices behind one table."""
    rows = [
        (
            daggered(row.label, row.standing),
            environment,
            str(choice["trial_seed"]),
            str(choice["hparams_seed"]),
            str(choice["step"]),
            f"{choice['validation_accuracy']:.1f}",
            f"{choice['accuracy']:.1f}",
            _settings(choice["hparams"]),
            choice["run"],
        )
        for row, environment, choice in _choices(table)
    ]
    return Grid(
        f"{table.dataset}-{table.rule.key}{'-sources' if table.sources else ''}-chosen",
        f"{table.dataset}, chosen by: {table.rule.title}",
        _HEADER,
        tuple(tuple(map(Shown, row)) for row in rows),
        table.protocol.line(),
        (),
    )


def _grids(report: Report) -> list[Grid]:
    return [grid_of(table) for table in report.tables]


def _notes(report: Report) -> list[str]:
    return [
        "Validation: the accuracy, in percent, that the run and its checkpoint were chosen by. Searched hparams: those "
        "that differ between the runs of the row.",
        *report.notes,
    ]


def _csv(report: Report) -> str:
    """A line for every trial of every cell; accuracies are percent, `hparam.NAME` columns hold what was searched."""
    searched = sorted({name for table in report.tables for row in table.rows for name in row.searched})
    lines = (
        {
            **place_of(table, row, environment),
            **{name: choice[name] for name in _CHOICE},
            **{f"hparam.{name}": value for name, value in choice["hparams"].items()},
        }
        for table in report.tables
        for row, environment, choice in _choices(table)
    )
    return csv_of_lines([*_PLACE, *_CHOICE, *(f"hparam.{name}" for name in searched)], lines)


CHOSEN_FORMATS = {
    "markdown": lambda report: markdown_of(_grids(report), _notes(report)),
    "latex": lambda report: latex_of(_grids(report), _notes(report)),
    "csv": _csv,
    "json": json_text,
}
