"""Tables on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

# The first are the heads.
Rows = list[Sequence[str]]


def show(rows: Rows) -> None:
    """Prints rows, the first being the heads: a table on a terminal, tab-separated lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table(*rows[0], box=box.SIMPLE_HEAD)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
