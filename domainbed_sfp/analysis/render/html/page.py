"""A sweep, finished or running, as one page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_sfp.analysis.account import Account, JobKey, explain_missing, row_labels, take_account
from domainbed_sfp.analysis.comparison import compare
from domainbed_sfp.analysis.methods import label_methods
from domainbed_sfp.analysis.render import chosen
from domainbed_sfp.analysis.render.comparison import comparison_grids
from domainbed_sfp.analysis.render.grids import Grid, grids_of
from domainbed_sfp.analysis.render.html import figures, svg
from domainbed_sfp.analysis.render.html.self_contained import content_policy, packaged_text
from domainbed_sfp.analysis.render.looks import short_label
from domainbed_sfp.analysis.report import build_report
from domainbed_sfp.analysis.selection import RULES, TRAINING_DOMAIN
from domainbed_sfp.analysis.tables import Report, environment_names
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.version import __version__
from domainbed_sfp.runs.records import Run, Warn, load_records, read_records

# Lines of a failed run's errors that the page shows, and runs that it shows them of.
_LAST_LINES = 12
_FAILURES = 20


def report_page(input_dir: str | Path, warn: Warn, *, include_incomplete: bool = False) -> str:
    """The page of the sweep in `input_dir`. Raises UserError where nothing there can be read as one."""
    runs = load_records(input_dir, warn=warn)
    account = take_account(runs, input_dir, include_incomplete=include_incomplete)
    report = build_report(account, RULES)
    return _render(
        title=f"Sweep report: {', '.join(dict.fromkeys(job.dataset for job in [*account.runs, *account.missing]))}",
        counts=_counts(account),
        rules=_tables_by_rule(report),
        datasets=_figures(report, runs, Path(input_dir)),
        comparisons=_comparisons(report),
        chosen=[chosen.grid_of(table) for table in report.tables if table.rule is TRAINING_DOMAIN],
        missing=_missing(account),
        failures=_failures(account, Path(input_dir)),
        notes=report.notes,
    )


def _counts(account: Account) -> str:
    done = sum(run.complete for run in account.runs.values())
    return f"{done} runs are finished and counted, {len(account.missing)} are missing, incomplete or failed."


def _tables_by_rule(report: Report) -> list[tuple[str, list[Grid]]]:
    by_rule = []
    for rule in dict.fromkeys(table.rule for table in report.tables):
        part = Report(
            tuple(table for table in report.tables if table.rule is rule),
            tuple(averages for averages in report.averages if averages.rule is rule),
            (),
        )
        by_rule.append((rule.title, grids_of(part)))
    return by_rule


def _figures(report: Report, runs: Sequence[Run], root: Path) -> list[dict[str, Any]]:
    tables = [table for table in report.tables if table.rule is TRAINING_DOMAIN]
    labelled = list(zip(row_labels(runs), runs))
    names = [row.label for table in tables for row in table.measured]
    looks = svg.looks_of(list(dict.fromkeys([*names, *(label for label, _ in labelled)])))
    drawn = []
    for table in tables:
        of_dataset = [(label, run) for label, run in labelled if run.dataset == table.dataset]
        losses = {run.directory: _losses(root / run.directory) for _, run in of_dataset}
        by_environment = figures.environment_figure(table, looks)
        drawn.append(
            {
                "name": table.dataset,
                "key": svg.key({short_label(row.label): looks[row.label] for row in table.measured}),
                "costs": figures.cost_figures(table, looks),
                "environments": [by_environment] if by_environment else [],
                "training": figures.training_figures(of_dataset, losses, looks, table.dataset),
            }
        )
    return drawn


def _losses(directory: Path) -> dict[int, float]:
    """The training loss by step, from the run's own records."""
    try:
        found = list(read_records(directory, lambda message: None))
    except OSError:
        return {}
    return {one["step"]: one["loss"] for one in found if isinstance(one.get("loss"), float)}


def _comparisons(report: Report) -> list[Grid]:
    """Paired tests of ERM, or else the first row, against every other row, under training-domain validation."""
    tables = tuple(table for table in report.tables if table.rule is TRAINING_DOMAIN)
    part = Report(tables, (), ())
    labels = list(dict.fromkeys(row.label for table in tables for row in table.measured))
    if len(labels) < 2:
        return []
    try:
        return comparison_grids(compare(part, ["ERM" if "ERM" in labels else labels[0]]))
    except UserError:  # no data set has two rows to compare
        return []


def _missing(account: Account) -> list[str]:
    jobs = [*account.runs, *account.missing]
    labels = label_methods((job.dataset, job.method) for job in jobs)
    told = []
    for dataset in dict.fromkeys(job.dataset for job in account.missing):
        of_dataset = [run for job, run in account.runs.items() if job.dataset == dataset]
        names = environment_names(dataset, of_dataset) if of_dataset else _numbers(jobs, dataset)
        missing = {job: why for job, why in account.missing.items() if job.dataset == dataset}
        told += [f"{dataset}: {line}" for line in explain_missing(missing, labels[dataset], names)]
    return told


def _numbers(jobs: Sequence[JobKey], dataset: str) -> tuple[str, ...]:
    most = max(env for job in jobs if job.dataset == dataset for env in job.test_envs)
    return tuple(f"env{env}" for env in range(most + 1))


def _failures(account: Account, root: Path) -> list[tuple[str, str]]:
    """(run, last lines of its err.txt) of runs that left some."""
    counted = {run.directory for run in account.runs.values()}
    found = []
    for path in sorted(root.glob("*/err.txt")):
        if path.parent.name in counted:
            continue
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip() for line in file if line.strip()][-_LAST_LINES:]
        if lines:
            found.append((path.parent.name, "\n".join(lines)))
    return found[:_FAILURES]


def _render(**values: Any) -> str:
    # Imported here because only pages need it.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = (packaged_text(__package__, name) for name in ("report.css", "report.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(packaged_text(__package__, "report.html")).render(
        **values,
        version=__version__,
        markup=Markup,  # for the drawings alone, whose texts are escaped where they are made
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
    )
