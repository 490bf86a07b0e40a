"""How rows look in figures: a short name, and a colour that an algorithm has in every one of them."""

from __future__ import annotations

import re
import zlib

from domainbed_sfp.analysis.tables import Table

# Okabe & Ito ("Color Universal Design", 2008) without yellow and black, which a light and a dark page swallow, and
# three more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#8C564B", "#7F7F7F")

# Algorithms that are often compared are told apart by colour; others take one by their name.
_COLOUR_OF = {
    "ERM": 8, "Random": 7, "Magnitude": 0, "Taylor": 5, "MRM": 2, "SparseIRM": 3, "DCWP": 6, "EVIL": 2, "SFP": 1,
    "SFPWeighted": 4, "SFPAligned": 3, "GlobalPru": 6, "UniformQuant": 0, "StaticMixedPrecision": 5, "DQMQ": 1,
}  # fmt: skip


def algorithm_of(row: str) -> str:
    """The algorithm of a row by its name in the tables: what stands before its settings."""
    return row.split(" (", 1)[0]


def colour_of(row: str) -> str:
    """The colour of a row's algorithm, the same in every figure."""
    name = algorithm_of(row)
    return COLOURS[_COLOUR_OF.get(name, zlib.crc32(name.encode()) % len(COLOURS))]


def bars_text(table: Table) -> str:
    """What the bars of a figure are, where there are any."""
    errors = [cell.std_err for row in table.measured for cell in row.cells if cell is not None]
    if all(error is None for error in errors):
        return "A single trial each, so no bars"
    return "Bars: standard error over trials" + (", none of a single one" if None in errors else "")


def short_label(row: str) -> str:
    """A row's name in a figure: "SFP 50 %" for "SFP (sparsity=0.5)", with whatever else is set behind it."""
    found = re.fullmatch(r"([^()]+) \((.*)\)", row)
    if not found:
        return row
    settings = dict(one.split("=", 1) for one in found[2].split(", ") if "=" in one)
    try:
        sparsity = f" {100 * float(settings.pop('sparsity')):g} %"
    except (KeyError, ValueError):
        return row
    rest = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"{found[1]}{sparsity}" + (f" ({rest})" if rest else "")
