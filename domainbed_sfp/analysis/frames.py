"""A sweep in pandas: its records as a frame, and what selection, tables and comparisons make of it.

Everything here goes through the code that `collect` goes through, so that the numbers are the same.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from domainbed_sfp.analysis.account import row_labels, take_account
from domainbed_sfp.analysis.comparison import Comparison, Summary
from domainbed_sfp.analysis.comparison import compare as compare_rows
from domainbed_sfp.analysis.report import build_report
from domainbed_sfp.analysis.rows import Cell, Row
from domainbed_sfp.analysis.selection import RULES, TRAINING_DOMAIN, Rule
from domainbed_sfp.analysis.tables import Report, Table, one_a_dataset
from domainbed_sfp.core.errors import UserError, unknown_name
from domainbed_sfp.runs.records import COST_FIELDS, Run, load_records

# What a run is, once for all of its records.
_RUN_COLUMNS = ("run", "complete", "failure", "dataset", "algorithm", "row", "test_env", "trial_seed", "hparams_seed")
# Objects, from which runs are put together again.
_OBJECT_COLUMNS = ("args", "hparams", "facts")


def read_records(input_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """All records of a sweep, one row each.

    Parameters
    ----------
    input_dir : path
        The folder of a sweep, as `collect --input_dir` takes it; written by this package or by DomainBed.

    Returns
    -------
    pandas.DataFrame
        Columns: `run` (the folder's name), `complete`, `failure`, `dataset`, `algorithm`, `row` (the name that tables
        give it, settings included), `test_env` (a number, or a tuple of several), `trial_seed`, `hparams_seed`, `step`,
        `final_compression`, `env{i}_in_acc` and `env{i}_out_acc` (fractions), the costs that records have (`sparsity`,
        `macs`, `bitops`, ...), and the dictionaries `hparams`, `args` and `facts`. Rows may be left out with pandas
        before the frame goes on to `select`, `table` or `compare`; what a run is, its columns say together.

    Raises
    ------
    UserError
        If there are no records, or they cannot be read.

    Examples
    --------
    >>> import domainbed_sfp as dsfp
    >>> frame = dsfp.read_records("results/sparsity_curves")
    >>> sorted(frame.dataset.unique())
    ['FullColoredDigits']
    """
    runs = load_records(input_dir, warn=_warn)
    frame = pd.concat(map(_frame_of, runs, row_labels(runs)), ignore_index=True)
    accuracies = sorted(
        (name for name in frame if name.startswith("env")), key=lambda name: int(name[3:].split("_")[0])
    )
    costs = [name for name in COST_FIELDS if name in frame]
    return frame[[*_RUN_COLUMNS, "step", "final_compression", *accuracies, *costs, *_OBJECT_COLUMNS]]


def select(frame: pd.DataFrame, rule: str = TRAINING_DOMAIN.key) -> pd.DataFrame:
    """The checkpoints that a selection rule chooses, one row for each data set, table row, environment and trial.

    Parameters
    ----------
    frame : pandas.DataFrame
        What `read_records` gives, or a part of it.
    rule : str
        `training-domain`, `leave-one-out` or `oracle`, as `collect --selection`.

    Returns
    -------
    pandas.DataFrame
        Columns: `dataset`, `row`, `algorithm`, `environment` (its name), `test_env`, `trial_seed`, `hparams_seed`,
        `step`, `validation`, `test`, `in_domain` (fractions), the costs, `run` and `hparams`. Of runs that hold out
        several environments also `trained_on`, the names of the others.
    """
    report = report_of(frame, rule)
    chosen = []
    for table in report.tables:
        for row in table.rows:
            for env, cell in enumerate(row.cells):
                for trial, choice in cell.choices if cell else ():
                    run, at = choice.run, choice.checkpoint
                    chosen.append(
                        {
                            "dataset": table.dataset,
                            "row": row.label,
                            "algorithm": row.algorithm,
                            **_place(table, env),
                            "trial_seed": trial,
                            "hparams_seed": run.hparams_seed,
                            "step": run.steps[at],
                            "validation": choice.validation,
                            "test": choice.test,
                            "in_domain": choice.in_domain,
                            **{name: float(values[at]) for name, values in run.costs.items()},
                            "run": run.directory,
                            "hparams": run.hparams,
                        }
                    )
    return pd.DataFrame(chosen)


def table(frame: pd.DataFrame, rule: str = TRAINING_DOMAIN.key, dataset: str | None = None) -> pd.DataFrame:
    """The table that `collect` prints of a data set, with unrounded numbers in percent.

    Parameters
    ----------
    frame, rule
        As in `select`.
    dataset : str, optional
        Which data set; needed where the frame holds several.

    Returns
    -------
    pandas.DataFrame
        A line for each row, in the order of `collect`'s tables. For each environment, its name with the mean accuracy
        and `NAME_std_err`; then `average`, `average_std_err`, `in_domain`, `trials` (the fewest of an environment) and
        the costs. What cannot be computed is missing (NaN).

    Examples
    --------
    >>> import domainbed_sfp as dsfp
    >>> table = dsfp.table(dsfp.read_records("results/globalpru_coloured"))
    >>> float(table.loc["Taylor", "10%"].round(1))
    51.9
    """
    return _wide(_one_table(report_of(frame, rule), dataset))


def compare(
    frame: pd.DataFrame,
    row: str,
    *others: str,
    rule: str = TRAINING_DOMAIN.key,
    exclude: Sequence[str] = (),
) -> pd.DataFrame:
    """One row of the tables against others, in pairs over environments and trials, as `collect --compare`.

    Parameters
    ----------
    frame, rule
        As in `select`.
    row : str
        The row that is compared, by its name in the tables.
    *others : str
        Rows to compare it with, or `best`, the best other row that is compressed as far; none: every other row.
    exclude : sequence of str
        Rows or algorithms that `best` and "every other row" leave out.

    Returns
    -------
    pandas.DataFrame
        A line for each data set and other row: `dataset`, `row`, `other`, their averages `accuracy` and
        `other_accuracy` in percent, `difference` in points with its 95 % interval `low` and `high`, `pairs`, `won`,
        `tied`, `lost`, `p_t`, `p_wilcoxon` and both after Holm's correction, `p_t_holm` and `p_wilcoxon_holm`.

    Examples
    --------
    >>> import domainbed_sfp as dsfp
    >>> one = dsfp.compare(dsfp.read_records("results/globalpru_coloured"), "GlobalPru", "Taylor").iloc[0]
    >>> int(one.pairs), float(one.difference.round(1))
    (3, 4.3)
    """
    compared = compare_rows(report_of(frame, rule), [row, *others], exclude)
    return pd.DataFrame(
        [_compared(one.table.dataset, one.row, other) for one in compared.tables for other in one.comparisons]
    )


def _frame_of(run: Run, label: str) -> pd.DataFrame:
    count, environments = len(run.steps), range(run.in_acc.shape[1])
    test_env: Any = run.test_envs[0] if len(run.test_envs) == 1 else run.test_envs
    columns: dict[str, Any] = {
        "run": run.directory,
        "complete": run.complete,
        "failure": run.failure,
        "dataset": run.dataset,
        "algorithm": run.algorithm,
        "row": label,
        "test_env": [test_env] * count,
        "trial_seed": run.trial_seed,
        "hparams_seed": run.hparams_seed,
        "step": run.steps,
        "final_compression": run.final,
    }
    for env in environments:
        columns[f"env{env}_in_acc"] = run.in_acc[:, env]
        columns[f"env{env}_out_acc"] = run.out_acc[:, env]
    columns.update(run.costs)
    for name in _OBJECT_COLUMNS:
        columns[name] = [getattr(run, name)] * count
    return pd.DataFrame(columns)


def _runs_of(frame: pd.DataFrame) -> Iterator[Run]:
    """The runs whose records the frame holds."""
    lacking = [name for name in ("run", "step", "final_compression", *_OBJECT_COLUMNS) if name not in frame]
    if lacking:
        raise UserError(f"this frame has no column {lacking[0]!r}; expected what read_records gives, or rows of it")
    # Records of several arguments in one folder are several runs, as they are where records are read.
    texts = frame["args"].map(lambda args: repr(sorted(args.items())))
    for _, records in frame.groupby([frame["run"], texts], sort=False):
        first, last = records.iloc[0], records.iloc[-1]
        environments = 0
        while f"env{environments}_in_acc" in records and not np.isnan(first[f"env{environments}_in_acc"]):
            environments += 1
        columns = [[f"env{env}_{split}_acc" for env in range(environments)] for split in ("in", "out")]
        costs = {name: records[name].to_numpy(float) for name in COST_FIELDS if name in records}
        yield Run(
            first["run"],
            bool(first["complete"]),
            first["failure"],
            last["args"],
            last["hparams"],
            last["facts"],
            records["step"].tolist(),
            records[columns[0]].to_numpy(float),
            records[columns[1]].to_numpy(float),
            records["final_compression"].to_numpy(bool),
            {name: values for name, values in costs.items() if not np.isnan(values).all()},
        )


def report_of(frame: pd.DataFrame, rule: str) -> Report:
    """The tables of one selection rule, as figures take them. Raises UserError where there is none."""
    if not len(frame):
        raise UserError("this frame holds no records")
    account = take_account(list(_runs_of(frame)), None, include_incomplete=False)
    report = build_report(account, [_rule(rule)])
    if not report.tables:
        raise UserError(f"these records give no table: {' '.join(report.notes)}")
    return report


def _rule(key: str) -> Rule:
    for rule in RULES:
        if rule.key == key:
            return rule
    raise unknown_name("selection rule", key, [rule.key for rule in RULES])


def _one_table(report: Report, dataset: str | None) -> Table:
    tables = one_a_dataset(report.tables)
    names = [table.dataset for table in tables]
    if dataset is None and len(names) > 1:
        raise UserError(f"these records are of {len(names)} data sets; give one of them as dataset: {', '.join(names)}")
    if dataset is not None and dataset not in names:
        raise unknown_name("data set", dataset, names)
    return tables[names.index(dataset) if dataset is not None else 0]


def _place(table: Table, column: int) -> dict[str, Any]:
    """Which environment a column of a table is about."""
    if not table.sources:
        return {"environment": table.environments[column], "test_env": column}
    source = table.sources[column]
    trained_on = tuple(name for env, name in enumerate(table.names) if env not in source.test_envs)
    return {"environment": table.names[source.env], "test_env": source.env, "trained_on": trained_on}


def _wide(table: Table) -> pd.DataFrame:
    lines = []
    for row in table.rows:
        line: dict[str, Any] = {"row": row.label}
        for env, (name, cell) in enumerate(zip(table.environments, row.cells)):
            if env in table.planned:
                line.update(_percent(name, cell))
        line.update(_percent("average", row.average))
        line.update(in_domain=_number(row.in_domain), trials=_trials(row), **row.costs)
        lines.append(line)
    return pd.DataFrame(lines).set_index("row")


def _percent(name: str, cell: Cell | None) -> dict[str, float]:
    return {
        name: np.nan if cell is None else cell.accuracy,
        f"{name}_std_err": np.nan if cell is None else _number(cell.std_err),
    }


def _trials(row: Row) -> int:
    return min((cell.trials or 0 for cell in row.cells if cell is not None), default=0)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _compared(dataset: str, row: Summary, other: Comparison) -> dict[str, Any]:
    test = other.test
    numbers = {name: asdict(test)[name] for name in ("pairs", "won", "tied", "lost", "difference")}
    return {
        "dataset": dataset,
        "row": row.label,
        "other": other.other.label,
        "accuracy": np.nan if row.average is None else row.average.accuracy,
        "other_accuracy": np.nan if other.other.average is None else other.other.average.accuracy,
        **numbers,
        "low": np.nan if test.interval is None else test.interval.low,
        "high": np.nan if test.interval is None else test.interval.high,
        "p_t": _number(test.p_t),
        "p_wilcoxon": _number(test.p_wilcoxon),
        "p_t_holm": _number(other.p_t_holm),
        "p_wilcoxon_holm": _number(other.p_wilcoxon_holm),
    }


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
