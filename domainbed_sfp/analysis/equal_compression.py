"""The best other row that is compressed as far as a row: what a comparison's word `best` stands for."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_sfp.analysis.rows import Row, average_of
from domainbed_sfp.analysis.tables import SPARSITY_TOLERANCE, Table, tested_environments

BEST = "best"
# BitOPs that differ by no more of the larger are equal: few assignments of widths lie near a budget.
BITOPS_TOLERANCE = 0.05
# What BEST stands for, for readers.
BEST_RULE = (
    f"the best other row that is compressed as far: a pruning row of equal sparsity (within "
    f"{100 * SPARSITY_TOLERANCE:g} points), a quantizing row of equal BitOPs (within {100 * BITOPS_TOLERANCE:g} %)"
)


def best_of_equal_compression(table: Table, row: Row, candidates: Sequence[Row]) -> tuple[Row | None, str]:
    """The best other row that is compressed as far, and what has to be said about the choice; None and why there is
    none."""
    sparsity, bitops = _sparsity(row), _bitops_share(row)
    if sparsity > 0:
        kind, tolerance = "pruning", f"{100 * SPARSITY_TOLERANCE:g} points"
        of_what = f"sparsity {100 * sparsity:.1f}%" + "".join(f" ({units})" for units in sorted(_units(row)))
        equal = [
            one
            for one in candidates
            if _sparsity(one) > 0
            and abs(_sparsity(one) - sparsity) <= SPARSITY_TOLERANCE
            and _units(one) == _units(row)
        ]
    elif bitops is not None:
        kind, tolerance = "quantizing", f"{100 * BITOPS_TOLERANCE:g} %"
        of_what = f"{100 * bitops:.1f}% of the 8-bit network's BitOPs"
        equal = [
            one
            for one in candidates
            if (share := _bitops_share(one)) is not None
            and _sparsity(one) <= 0
            and abs(share - bitops) <= BITOPS_TOLERANCE * max(share, bitops)
        ]
    else:
        return None, f"no {BEST} row of equal compression, {row.label} neither prunes nor quantizes."
    tested = tested_environments(table)
    averages = [(average_of([one.cells[env] for env in tested]), one) for one in equal]
    whole = [(average.accuracy, one) for average, one in averages if average is not None]
    if not whole:
        return None, f"no other {kind} row of {of_what} has a result in every tested environment."
    average, best = max(whole, key=lambda entry: entry[0])
    said = (
        f"{BEST}: {best.label}, the highest test accuracy ({average:.1f}) of {len(whole)} other {kind} "
        f"row{'' if len(whole) == 1 else 's'} of {of_what}, within {tolerance}. "
        "Choosing it by test accuracy favours it: its average is optimistic, and the difference conservative for "
        f"{row.label}. The p-values take no account of the choice."
    )
    lacking = [one.label for average, one in averages if average is None]
    if lacking:
        said += f" Not considered, for want of a result in an environment: {', '.join(lacking)}."
    return best, said


def _sparsity(row: Row) -> float:
    return row.costs.get("sparsity", 0.0)


def _bitops_share(row: Row) -> float | None:
    """BitOPs as a fraction of the 8-bit network's; None where nothing is quantized."""
    most = row.costs.get("bitops_8bit")
    return row.costs["bitops"] / most if most and "bitops" in row.costs else None


def _units(row: Row) -> set[str]:
    """What its chosen runs prune, "weights" or "channels", where they say so. A residual stream's channels cost more
    than others: half of all of them is not half of those inside blocks."""
    runs = [choice.run for cell in row.cells if cell for _, choice in cell.choices]
    return {
        f"{run.facts['granularity']}s" + (", residual streams too" if run.hparams.get("prune_residual_streams") else "")
        for run in runs
        if run.facts.get("granularity")
    }
