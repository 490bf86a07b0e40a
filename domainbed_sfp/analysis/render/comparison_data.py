"""Comparisons for programs: CSV and JSON, unrounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from domainbed_sfp.analysis.comparison import AcrossDatasets, Comparison, ComparisonReport, Summary
from domainbed_sfp.analysis.equal_compression import BEST
from domainbed_sfp.analysis.render.comparison import table_notes
from domainbed_sfp.analysis.render.csv_files import csv_of_lines
from domainbed_sfp.analysis.significance import CONFIDENCE, PairedTest
from domainbed_sfp.core.version import __version__

_COLUMNS = (
    "dataset",
    "selection",
    "environments",
    "row",
    "average",
    "std_err",
    "bootstrap_low",
    "bootstrap_high",
    "other",
    "best",
    "other_average",
    "other_std_err",
    "other_bootstrap_low",
    "other_bootstrap_high",
    "difference",
    "low",
    "high",
    "pairs",
    "won",
    "tied",
    "lost",
    "unpaired",
    "t",
    "p_t",
    "p_t_holm",
    "p_wilcoxon",
    "p_wilcoxon_holm",
    "remarks",
)


def csv_comparison(report: ComparisonReport) -> str:
    """A line for every pair of rows on every data set, and with an empty dataset those over data sets, whose pairs are
    the data sets. Accuracies are percent, differences percentage points; a missing value is empty."""
    return csv_of_lines(_COLUMNS, _lines(report))


def _lines(report: ComparisonReport) -> Iterator[dict[str, Any]]:
    for table in report.tables:
        for one in table.comparisons:
            yield {
                "dataset": table.table.dataset,
                "selection": table.table.rule.key,
                "environments": " ".join(table.environments),
                "row": table.row.label,
                **_summary_numbers(table.row),
                "other": one.other.label,
                "best": int(one.is_best),
                **{f"other_{name}": value for name, value in _summary_numbers(one.other).items()},
                **_test_numbers(one.test),
                "unpaired": sum(len(trials) for _, _, trials in one.unpaired),
                "p_t_holm": one.p_t_holm,
                "p_wilcoxon_holm": one.p_wilcoxon_holm,
                "remarks": "; ".join(one.test.remarks),
            }
    for across in report.across:
        for name, test, p_holm in across.tests:
            line: dict[str, Any] = {"dataset": "", "selection": across.rule.key, "row": across.label, "other": name}
            line |= {"best": int(name == BEST), **_test_numbers(test), "p_wilcoxon_holm": p_holm}
            yield {**line, "remarks": "; ".join(test.remarks)}


def json_comparison(report: ComparisonReport) -> str:
    """Everything a comparison holds, ranks over data sets included."""
    document = {
        "format": 1,
        "package": f"domainbed_sfp {__version__}",
        "unit": "percent",
        "confidence": CONFIDENCE,
        "tables": [
            {
                "dataset": table.table.dataset,
                "selection": table.table.rule.key,
                "environments": list(table.environments),
                "protocol": table.table.protocol.as_dict(),
                "row": _summary(table.row),
                "comparisons": [_comparison(one) for one in table.comparisons],
                "notes": table_notes(table),
            }
            for table in report.tables
        ],
        "across_datasets": [_across(across) for across in report.across],
        "notes": list(report.notes),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _summary(summary: Summary) -> dict[str, Any]:
    return {"label": summary.label, "standing": summary.standing} | _summary_numbers(summary)


def _summary_numbers(summary: Summary) -> dict[str, Any]:
    return {
        "average": summary.average.accuracy if summary.average else None,
        "std_err": summary.average.std_err if summary.average else None,
        "bootstrap_low": summary.interval.low if summary.interval else None,
        "bootstrap_high": summary.interval.high if summary.interval else None,
    }


def _test_numbers(test: PairedTest) -> dict[str, Any]:
    return {
        "difference": test.difference,
        "low": test.interval.low if test.interval else None,
        "high": test.interval.high if test.interval else None,
        "pairs": test.pairs,
        "won": test.won,
        "tied": test.tied,
        "lost": test.lost,
        "t": test.t,
        "p_t": test.p_t,
        "p_wilcoxon": test.p_wilcoxon,
    }


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "other": _summary(one.other),
        "best": one.is_best,
        **_test_numbers(one.test),
        "p_t_holm": one.p_t_holm,
        "p_wilcoxon_holm": one.p_wilcoxon_holm,
        "unpaired": [
            {"lacking": lacking, "environment": environment, "trial_seeds": list(trials)}
            for lacking, environment, trials in one.unpaired
        ],
        "remarks": list(one.test.remarks),
    }


def _across(across: AcrossDatasets) -> dict[str, Any]:
    ranking = across.ranking
    return {
        "selection": across.rule.key,
        "datasets": list(across.datasets),
        "row": across.label,
        "comparisons": [
            {"other": name, **_test_numbers(test), "p_wilcoxon_holm": p_holm, "remarks": list(test.remarks)}
            for name, test, p_holm in across.tests
        ],
        "ranking": None
        if ranking is None
        else {
            "rows": [{"label": label, "mean_rank": rank} for label, rank in zip(across.ranked, ranking.mean_ranks)],
            "friedman_chi_square": ranking.chi_square,
            "p_chi_square": ranking.p,
            "p_permutation": ranking.p_permutation,
            "nemenyi_critical_difference": ranking.critical_difference,
        },
        "notes": list(across.notes),
    }
