"""Turn merged predictions into CSV, Parquet or one JSON object, after the merge.

The JSONL file stays the one that counts: it alone keeps every value as it was predicted.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from ..errors import UsageError, no_room_named
from ..files import parse_json, replacing
from .rows import ID, PREDICTION

_BATCH_ROWS = 8192


def write_csv(jsonl_path: Path, csv_path: Path) -> None:
    """Write the rows as CSV (RFC 4180); newlines and quotes within texts are kept.

    The columns are the fields of all rows in order of appearance. A missing field and null
    are empty cells; lists, objects and booleans are written as JSON.
    """
    columns = _columns(jsonl_path)
    with no_room_named(str(csv_path)), replacing(csv_path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows([_cell(row.get(name)) for name in columns] for row in _rows(jsonl_path))
        text.detach()


def _cell(value: Any) -> Any:
    return orjson.dumps(value).decode() if isinstance(value, (list, dict, bool)) else value


def write_parquet(jsonl_path: Path, parquet_path: Path) -> None:
    """Write the rows as Parquet; a column's type fits all of its values.

    Raises:
        UsageError: pyarrow is not installed, or a column mixes types, such as text and numbers.
    """
    try:
        import pyarrow as pa  # optional, and slow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow, which is not installed: pip install pyarrow") from error

    columns = _columns(jsonl_path)
    schema = pa.schema([])
    try:
        for batch in _batches(jsonl_path, columns):
            found = pa.RecordBatch.from_pydict(batch).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        with (
            no_room_named(str(parquet_path)),
            replacing(parquet_path) as stream,
            pq.ParquetWriter(stream, schema) as writer,
        ):
            for batch in _batches(jsonl_path, columns):
                writer.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))
    except pa.ArrowException as error:
        raise UsageError(f"{jsonl_path} does not fit into Parquet's columns: {error}; keep it as JSONL") from error


def write_answers(jsonl_path: Path, json_path: Path) -> None:
    """Write {id: prediction} as one JSON object.

    The evaluation scripts of SQuAD and KorQuAD read it.

    Raises:
        UsageError: a row has no id, or two rows have one.
    """
    found: dict[str, Any] = {}
    for number, row in enumerate(_rows(jsonl_path), 1):
        if row.get(ID) is None:
            raise UsageError(
                f"row {number} of {jsonl_path} has no id, by which a .json file holds its prediction; predict with "
                "data.columns.id=COLUMN"
            )
        if (name := str(row[ID])) in found:
            raise UsageError(f"row {number} of {jsonl_path} has the id {name!r} of an earlier row; write .csv instead")
        found[name] = row[PREDICTION]
    with no_room_named(str(json_path)), replacing(json_path) as stream:
        stream.write(json.dumps(found, ensure_ascii=False, indent=1).encode() + b"\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        yield from map(parse_json, stream)


def _columns(path: Path) -> list[str]:
    return list(dict.fromkeys(name for row in _rows(path) for name in row))


def _batches(path: Path, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    rows = _rows(path)
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield {name: [row.get(name) for row in batch] for name in columns}
