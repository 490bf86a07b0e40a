"""CSV: unrounded numbers, one line each; a missing value is empty."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any


def csv_of_lines(columns: Sequence[str], lines: Iterable[Mapping[str, Any]], *, quote_texts: bool = False) -> str:
    """A head of `columns`, and the lines; `quote_texts`: texts are quoted whether they need it or not."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if quote_texts else csv.QUOTE_MINIMAL
    )
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def csv_of_points(points: Sequence[Any]) -> str:
    """Dataclasses of one kind, a line each; true is 1, false 0."""
    lines = (
        {name: int(value) if isinstance(value, bool) else value for name, value in asdict(point).items()}
        for point in points
    )
    return csv_of_lines([field.name for field in fields(points[0])], lines)
