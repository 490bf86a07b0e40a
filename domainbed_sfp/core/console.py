"""What commands say on the console: tables, and warnings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# The first are the heads.
Rows = list[Sequence[str]]


def show(rows: Rows) -> None:
    """Prints rows, the first being the heads: a table on a terminal, tab-separated lines elsewhere."""
    from rich import box  # here, so that what only warns starts without it
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table(*rows[0], box=box.SIMPLE_HEAD)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def warn(message: str) -> None:
    """One line on the standard error."""
    print(f"warning: {message}", file=sys.stderr)
