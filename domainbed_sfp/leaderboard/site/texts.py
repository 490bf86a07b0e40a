"""What readers see of a line of the board, in every format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from domainbed_sfp.analysis.render.grids import (
    ABSENT,
    MISSING,
    daggered,
    magnitude,
)
from domainbed_sfp.leaderboard.documents.problems import printable
from domainbed_sfp.leaderboard.site.board import Line, Ranking

UNVERIFIED = "\N{DOUBLE DAGGER}"


def label_of(line: Line) -> str:
    """A line's name as readers see it; reconstructions are marked."""
    return daggered(line.entry.name, line.entry.standing)


def accuracy_text(accuracy: float, std_err: float | None) -> str:
    """As the tables of `collect` print it."""
    return f"{accuracy:.1f} ± {ABSENT if std_err is None else format(std_err, '.1f')}"


def average_text(line: Line) -> str:
    """The average over environments."""
    return MISSING if line.result.average is None else accuracy_text(*line.result.average)


def worst_text(line: Line) -> str:
    """The lowest accuracy with its environment."""
    worst = line.result.worst
    return MISSING if worst is None else f"{worst[1]:.1f} ({printable(worst[0])})"


def trials_text(line: Line) -> str:
    """Trials of its cells."""
    counts = sorted({len(cell.trials) for cell in line.result.cells if cell})
    return "-".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else ABSENT


def sparsity_text(line: Line) -> str:
    """The part of the method's own units that is removed."""
    sparsity = line.result.costs.get("sparsity")
    return ABSENT if sparsity is None else marked_if_unverified(f"{100 * sparsity:.1f}%", line, "sparsity")


def part_text(line: Line, left: str, dense: str) -> str:
    """A cost that is left, and its part of the dense one."""
    costs = line.result.costs
    if left not in costs:
        return ABSENT
    part = f" ({100 * costs[left] / costs[dense]:.0f}%)" if costs.get(dense) else ""
    return marked_if_unverified(magnitude(costs[left]) + part, line, left, *([dense] if part else []))


def bitops_text(line: Line) -> str:
    """Its BitOPs."""
    return ABSENT if line.bitops is None else marked_if_unverified(magnitude(line.bitops), line, line.source_of_bitops)


def marked_if_unverified(text: str, line: Line, *names: str) -> str:
    """A number as readers see it: one that nobody recomputed is marked."""
    return f"{text} {UNVERIFIED}" if set(names) & set(line.entry.unverified) else text


def unverified_axes(line: Line) -> list[str]:
    """The axes of the page's plots on which this line's cost was not recomputed."""
    sources = {"macs": "macs", "bitops": line.source_of_bitops, "parameters": "surviving_parameters"}
    return [axis for axis, name in sources.items() if name in line.entry.unverified]


def has_bitops(ranking: Ranking) -> bool:
    """Whether BitOPs tell its lines apart better than MACs: where one of them is quantized."""
    return any("bitops" in line.result.costs for line in ranking.lines)


def shared_protocol(ranking: Ranking) -> tuple[str, list[str]]:
    """What the lines' protocols agree in, as a sentence, and the fields in which they differ."""
    told, differing = [], []
    names: Mapping[str, Callable[[Any], str]] = {
        "steps": "{:,} steps".format,
        "backbone": "backbone {}".format,
        "weights": "weights {}".format,
        "image_size": lambda size: f"{size} px images" if size else "",
        "hparams_seeds": lambda seeds: f"{len(seeds)} hparams draw{'s' * (len(seeds) != 1)}",
        "trial_seeds": lambda seeds: f"{len(seeds)} trial{'s' * (len(seeds) != 1)}",
        "holdout_fraction": "held-out fraction {}".format,
        "precision": "precision {}".format,
        "task": lambda task: "" if task == "domain_generalization" else f"task {task}",
    }
    for name, tell in names.items():
        # Seeds may differ where as many were drawn.
        values = dict.fromkeys(tell(line.entry.protocol[name]) for line in ranking.lines)
        if len(values) > 1:
            differing.append(name)
        else:
            told += [printable(text) for text in values if text]
    return "; ".join(told), differing


def protocol_text(ranking: Ranking) -> str:
    """The protocol of a ranking for readers."""
    told, differing = shared_protocol(ranking)
    words = ", ".join(name.replace("_", " ") for name in differing)
    return f"Protocol: {told}." + (f" The entries differ in: {words}." if differing else "")
