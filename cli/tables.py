"""Values as aligned columns, and bytes with a unit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[Sequence[object]], *, header: Sequence[str] = ()) -> str:
    """Return rows as aligned columns; numbers are aligned to the right."""
    table = [list(map(str, header))] * bool(header) + [[str(cell) for cell in row] for row in rows]
    if not table:
        return ""
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    is_number = [all(isinstance(row[place], (int, float)) for row in rows) for place in range(len(table[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in table)


def format_size(num_bytes: float) -> str:
    """Return bytes in the unit that leaves one to three digits before the point.

    1 kB is 1000 B.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:  # else three digits would be 1e+03
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} TB"


def format_value(value: Any) -> str:
    """Return a value of a recipe as text; nothing for null."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
