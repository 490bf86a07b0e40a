"""Accuracy and bits on degraded copies, for readers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from domainbed_sfp.analysis.degraded import RowOnCopies
from domainbed_sfp.analysis.render.grids import ABSENT, RECONSTRUCTION_NOTE, daggered
from domainbed_sfp.analysis.rows import RECONSTRUCTION
from domainbed_sfp.analysis.significance import paired_test


def markdown_text(summaries: Sequence[RowOnCopies]) -> str:
    """A table a data set: accuracy as they are, and at severities 1, 3 and 5; bits as they are and at 5; rho."""
    blocks = []
    for dataset in dict.fromkeys(summary.dataset for summary in summaries):
        here = [summary for summary in summaries if summary.dataset == dataset]
        severities = sorted({severity for summary in here for severity in summary.accuracy})
        shown = [severity for severity in (0, 1, 3, 5) if severity in severities] or severities
        head = ["Row", *(f"Accuracy, severity {s}" for s in shown), "Bits, severity 0", f"Bits, severity {shown[-1]}"]
        lines = [
            [*head, "Rho of severity and bits", "By degradation", "Runs"],
            ["---", *["--:"] * len(head), "---", "--:"],
        ]
        for summary in here:
            accuracies = [f"{summary.accuracy[s]:.1f}" if s in summary.accuracy else ABSENT for s in shown]
            bits = [f"{summary.bits[s]:.2f}" if s in summary.bits else ABSENT for s in (shown[0], shown[-1])]
            kinds = ", ".join(f"{kind} {rho:+.2f}" for kind, rho in summary.by_degradation.items()) or ABSENT
            lines.append(
                [
                    daggered(summary.row, summary.standing),
                    *accuracies,
                    *bits,
                    _correlation(summary),
                    kinds,
                    str(summary.n),
                ]
            )
        blocks.append(f"### {dataset}, degraded copies of the test environment\n\n" + _table(lines))
    blocks.append(
        "- Accuracy in percent and bits are means over runs and the five degradations (blur, noise, contrast, resize, "
        "JPEG); severity 0: the images as they are. They are those of the finished model on some of the test "
        "environment's images (`samples` of --csv), not of the selected model on all, as in other tables.\n"
        "- Rho: Spearman's rank correlation of severity and mean bits within a degradation, the images as they are "
        "among the cases (0 where bits do not move), mean over degradations; mean ± standard error over runs; p of a "
        "two-sided t-test against 0.\n"
        + (f"- {RECONSTRUCTION_NOTE}\n" if any(s.standing == RECONSTRUCTION for s in summaries) else "")
    )
    return "\n".join(blocks)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _correlation(summary: RowOnCopies) -> str:
    """Mean, standard error and p of a two-sided t-test against 0, in words."""
    if not summary.bits:
        return ABSENT
    if not summary.correlations:
        return "the bits never move"
    told = f"{fmean(summary.correlations):+.2f}"
    if len(summary.correlations) == 1:
        return f"{told} (one run)"
    error = stdev(summary.correlations) / len(summary.correlations) ** 0.5
    p = paired_test(summary.correlations).p_t
    return f"{told} ± {error:.2f}" + ("" if p is None else f" (p = {p:.2g})")
