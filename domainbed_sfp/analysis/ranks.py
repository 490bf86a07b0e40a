"""Rows ranked over data sets: Friedman's test and Nemenyi's critical difference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from domainbed_sfp.analysis.rows import average_of
from domainbed_sfp.analysis.significance import ALPHA, Ranking, blocks_needed
from domainbed_sfp.analysis.tables import Table, tested_environments


def rank_rows(
    tables: Sequence[Table], labels: Sequence[str] | None = None
) -> tuple[tuple[str, ...], np.ndarray, tuple[str, ...]]:
    """The rows (of `labels`, else all) with an average over the tested environments of every data set, their averages
    of shape (data sets, rows), and the labels left out for lacking one."""
    averages: dict[str, list[float]] = {}
    for table in tables:
        tested = tested_environments(table)
        for row in table.measured:
            known = averages.setdefault(row.label, [])
            average = average_of([row.cells[env] for env in tested])
            if average is not None:
                known.append(average.accuracy)
    wanted = list(averages) if labels is None else [label for label in averages if label in labels]
    ranked = tuple(label for label in wanted if len(averages[label]) == len(tables))
    left_out = tuple(label for label in wanted if label not in ranked)
    return ranked, np.array([averages[label] for label in ranked]).reshape(len(ranked), len(tables)).T, left_out


def ranking_notes(ranking: Ranking) -> list[str]:
    """What a reader must know of a critical difference that so few data sets give."""
    methods = len(ranking.mean_ranks)
    notes = [
        f"Ranks over {ranking.blocks} data sets: Friedman chi-square {ranking.chi_square:.2f}, p = {ranking.p:.3g} by "
        f"its approximation, {ranking.p_permutation:.3g} by permutation (to be preferred for few data sets); "
        f"Nemenyi critical difference {ranking.critical_difference:.2f} at {ALPHA} (Demsar, JMLR 2006)."
    ]
    if ranking.critical_difference > methods - 1:
        notes.append(
            f"With {ranking.blocks} data sets no two of {methods} rows can differ by the critical difference; "
            f"that takes {blocks_needed(methods)}."
        )
    return notes
