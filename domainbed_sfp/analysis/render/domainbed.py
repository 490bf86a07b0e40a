"""The compatible format: what DomainBed's collect_results prints, byte for byte.

Its conventions are kept here and nowhere else: runs that did not finish count, every checkpoint is a
candidate, the standard error divides by n, the table of averages fills holes from the environments there are,
unknown data sets are dropped and cells are cut at the column's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from domainbed_sfp.analysis.selection import RULES, Rule, choose
from domainbed_sfp.core.domainbed_facts import ALGORITHMS, DATASETS, ENVIRONMENTS
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.runs.records import Run

# Test accuracy chosen by a rule, by (trial_seed, dataset, algorithm, test_env), in the order the groups
# appear.
_Accuracies = dict[tuple[int, str, str, int], float]

_CELL_WIDTH = 20
_AVERAGES_CELL_WIDTH = 25


def domainbed_text(runs: Sequence[Run], *, latex: bool) -> str:
    """The tables of all three selection rules. `runs` must be in the order of os.listdir.

    Raises UserError when no run is on a data set that DomainBed knows.
    """
    names = {run.dataset for run in runs}
    datasets = [name for name in DATASETS if name in names]
    if not datasets:
        raise UserError(
            f"--format domainbed drops data sets that DomainBed does not know, here all: "
            f"{', '.join(sorted(names))}; use --format markdown"
        )
    seen = list(dict.fromkeys(run.algorithm for run in runs))
    algorithms = [name for name in ALGORITHMS if name in seen]
    algorithms += [name for name in seen if name not in ALGORITHMS]
    groups: dict[tuple[int, str, str, int], list[Run]] = {}
    for run in runs:
        for env in run.test_envs:
            groups.setdefault((run.trial_seed, run.dataset, run.algorithm, env), []).append(run)

    records = sum(len(run.steps) for run in runs)
    lines = _opening(records, latex)
    for rule in RULES:
        if latex:
            lines += ["", f"\\subsection{{Model selection: {rule.title}}}"]
        accuracies = _select(rule, groups)
        for dataset in datasets:
            lines += _dataset_table(accuracies, algorithms, dataset, rule, latex)
        lines += _averages_table(accuracies, algorithms, datasets, rule, latex)
    if latex:
        lines.append("\\end{document}")
    return "\n".join(lines) + "\n"


def _opening(records: int, latex: bool) -> list[str]:
    if not latex:
        return [f"Total records: {records}"]
    return [
        "\\documentclass{article}",
        "\\usepackage{booktabs}",
        "\\usepackage{adjustbox}",
        "\\begin{document}",
        "\\section{Full DomainBed results}",
        f"% Total records: {records}",
    ]


def _select(rule: Rule, groups: dict[tuple[int, str, str, int], list[Run]]) -> _Accuracies:
    accuracies = {}
    for group, runs in groups.items():
        choice = choose(rule, runs, group[-1])
        if choice is not None:
            accuracies[group] = choice.test
    return accuracies


def _dataset_table(accuracies: _Accuracies, algorithms: list[str], dataset: str, rule: Rule, latex: bool) -> list[str]:
    rows = []
    for algorithm in algorithms:
        cells: list[list[float]] = [[] for _ in ENVIRONMENTS[dataset]]
        for (_, group_dataset, group_algorithm, env), accuracy in accuracies.items():
            if (group_dataset, group_algorithm) == (dataset, algorithm) and env < len(cells):
                cells[env].append(accuracy)
        rows.append(_row(algorithm, cells, latex))
    lines = ["", f"\\subsubsection{{{dataset}}}"] if latex else []
    header = ["Algorithm", *ENVIRONMENTS[dataset], "Avg"]
    title = f"Dataset: {dataset}, model selection method: {rule.title}"
    return lines + _table(title, header, rows, _CELL_WIDTH, latex)


def _averages_table(
    accuracies: _Accuracies, algorithms: list[str], datasets: list[str], rule: Rule, latex: bool
) -> list[str]:
    rows = []
    for algorithm in algorithms:
        cells = []
        for dataset in datasets:
            by_trial: dict[int, list[float]] = {}
            for (trial, group_dataset, group_algorithm, _), accuracy in accuracies.items():
                if (group_dataset, group_algorithm) == (dataset, algorithm):
                    by_trial.setdefault(trial, []).append(accuracy)
            cells.append([float(np.mean(by_trial[trial])) for trial in sorted(by_trial)])
        rows.append(_row(algorithm, cells, latex))
    lines = ["", "\\subsubsection{Averages}"] if latex else []
    title = f"Averages, model selection method: {rule.title}"
    return lines + _table(title, ["Algorithm", *datasets, "Avg"], rows, _AVERAGES_CELL_WIDTH, latex)


def _row(label: str, cells: list[list[float]], latex: bool) -> list[str]:
    plus_minus = "$\\pm$" if latex else "+/-"
    texts, means = [], []
    for accuracies in cells:
        if accuracies:
            mean = 100 * np.mean(accuracies)
            error = 100 * np.std(np.array(accuracies) / np.sqrt(len(accuracies)))
            means.append(mean)
            texts.append(f"{mean:.1f} {plus_minus} {error:.1f}")
        else:
            texts.append("X")
    average = f"{sum(means) / len(means):.1f}" if len(means) == len(cells) else "X"
    return [label, *texts, average]


def _table(title: str, header: list[str], rows: list[list[str]], width: int, latex: bool) -> list[str]:
    if not latex:
        return ["", f"-------- {title}", *(_text_line(row, width, latex) for row in [header, *rows])]
    header = [f"\\textbf{{{name}}}".replace("%", "\\%") for name in header]
    return [
        "",
        "\\begin{center}",
        "\\adjustbox{max width=\\textwidth}{%",
        f"\\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
        "\\toprule",
        _text_line(header, width, latex),
        "\\midrule",
        *(_text_line(row, width, latex) for row in rows),
        "\\bottomrule",
        "\\end{tabular}}",
        "\\end{center}",
    ]


def _text_line(cells: list[str], width: int, latex: bool) -> str:
    separator, end = (" & ", " \\\\") if latex else ("  ", " ")
    return separator.join(cell.ljust(width)[:width] for cell in cells) + end
