"""Compare merged rows with the rows that were predicted.

Positions that no index says may be wrong: each row would still be there once. What rows say beside their prediction,
such as an id, shows it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...files import parse_json
from ...predictions.rows import INDEX, PREDICTION, RAW_PREDICTION
from .rows import read_rows

_MADE = {INDEX, PREDICTION, RAW_PREDICTION}


def compare_rows(merged: Path, positions: Sequence[int], *, data: Path, form: str) -> str:
    """Return which columns of *merged* are those of *data*, "" where both have none.

    The rows of *merged*, JSON lines or CSV by *form*, have those *positions* in *data*.

    Raises:
        UsageError: a column differs, or *data* ends before the last position.
    """
    rows = enumerate(read_rows(data))
    compared: dict[str, None] = {}
    for position, row in zip(positions, _rows(merged, form), strict=True):
        given = next((found for at, found in rows if at == position), None)
        if given is None:
            raise UsageError(f"{data} has no row {position + 1}, and one was merged with that position; check --rows")
        for name in row.keys() & given.keys() - _MADE:
            if _text(row[name]) != _text(given[name]):
                raise UsageError(
                    f"the shards were dealt out in another way: row {position} would be the one whose {name} is "
                    f"{row[name]!r}, and in {data} its {name} is {given[name]!r}; check --sampler, --batch-rows, "
                    "--rows and the order of the shards"
                )
            compared[name] = None
    return f"{', '.join(sorted(compared))} of every row as in {data}" if compared else ""


def _rows(merged: Path, form: str) -> Iterator[Mapping[str, Any]]:
    if form == ".csv":
        with merged.open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)
        return
    with merged.open("rb") as stream:
        yield from map(parse_json, stream)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
