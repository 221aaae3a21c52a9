"""Write merged predictions as another file: a table, or one JSON object.

The JSONL file stays the one that counts: it alone keeps every value as it was predicted.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any, Literal

from ..errors import UsageError, no_room_named
from ..files import parse_json, replacing
from .rows import ID, INDEX, PREDICTION

Format = Literal["csv", "csv_bom", "tsv", "jsonl", "json", "parquet"]
SUFFIXES: dict[Format, str] = {
    **{"csv": ".csv", "csv_bom": ".csv", "tsv": ".tsv", "jsonl": ".jsonl", "json": ".json"},
    "parquet": ".parquet",
}
Row = Mapping[str, Any]
Rows = Callable[[], Iterable[Row]]  # from the first row on, each time it is called
_BATCH_ROWS = 8192
_NUM_NAMED = 3


def merged_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a merged file."""
    with path.open("rb") as stream:
        yield from map(parse_json, stream)


def format_of(path: Path) -> Format:
    """Return the format that a file's name asks for.

    Raises:
        UsageError: it asks for none.
    """
    found = next((format for format, suffix in SUFFIXES.items() if suffix == path.suffix.lower()), None)
    if found is None:
        known = ", ".join(dict.fromkeys(SUFFIXES.values()))
        raise UsageError(f"{str(path)!r} has an unknown format; known: {known}")
    return found


def export(rows: Rows, path: Path, format: Format, columns: Sequence[str] = ()) -> None:
    """Write *rows* to *path*, which appears when it is complete.

    Without *columns* there are the fields of all rows, in order of appearance; a .json file then maps `id` to
    `prediction`, else the first of two columns to the second. In CSV (RFC 4180) a missing field and null are empty
    cells; lists, objects and booleans are written as JSON.

    Raises:
        UsageError: pyarrow is missing, a column of Parquet mixes types, or a .json file would have an id twice.
        NoRoomError: the disk is full.
    """
    columns = columns or ((ID, PREDICTION) if format == "json" else tuple(_fields(rows)))
    with no_room_named(str(path), "try again"), replacing(path) as stream:
        if format in ("csv", "csv_bom", "tsv"):
            _write_csv(rows, columns, stream, format)
        elif format == "parquet":
            _write_parquet(rows, columns, stream, path)
        elif format == "json":
            _write_object(rows, columns, stream, path)
        else:
            for row in rows():
                stream.write(json.dumps({name: row.get(name) for name in columns}, ensure_ascii=False).encode() + b"\n")


def _fields(rows: Rows) -> dict[str, None]:
    return dict.fromkeys(name for row in rows() for name in row)


def _write_csv(rows: Rows, columns: Sequence[str], stream: IO[bytes], format: Format) -> None:
    encoding = "utf-8-sig" if format == "csv_bom" else "utf-8"
    text = io.TextIOWrapper(stream, encoding=encoding, newline="")
    writer = csv.writer(text, delimiter="\t" if format == "tsv" else ",")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows())
    text.detach()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict, bool)) else value


def _write_parquet(rows: Rows, columns: Sequence[str], stream: IO[bytes], path: Path) -> None:
    """Write Parquet; a column's type fits all of its values."""
    try:
        import pyarrow as pa  # optional, and slow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow, which is not installed: pip install pyarrow") from error

    schema = pa.schema([])
    try:
        for batch in _batches(rows, columns):
            found = pa.RecordBatch.from_pydict(batch).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        with pq.ParquetWriter(stream, schema) as writer:
            for batch in _batches(rows, columns):
                writer.write_batch(pa.RecordBatch.from_pydict(batch, schema=schema))
    except pa.ArrowException as error:
        raise UsageError(f"{path} does not fit into Parquet's columns: {error}; keep it as JSONL") from error


def _batches(rows: Rows, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    left = iter(rows())
    while batch := list(islice(left, _BATCH_ROWS)):
        yield {name: [row.get(name) for row in batch] for name in columns}


def _write_object(rows: Rows, columns: Sequence[str], stream: IO[bytes], path: Path) -> None:
    """Write {id: prediction} as one JSON object, one pair a line.

    The evaluation scripts of SQuAD and KorQuAD read it.
    """
    if len(columns) != 2:
        raise UsageError(f"{path} holds {{id: prediction}}, two columns, and here are {', '.join(columns)}")
    seen = set[str]()
    for number, row in enumerate(rows(), 1):
        identifier = row.get(columns[0])
        if identifier is None:
            raise UsageError(
                f"row {number} has no {columns[0]}, by which {path} holds its prediction; predict with "
                "data.columns.id=COLUMN"
            )
        if (name := str(identifier)) in seen:
            raise UsageError(
                f"row {number} has the {columns[0]} {name!r} of an earlier row; write .csv instead of {path}"
            )
        seen.add(name)
        pair = f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(row[columns[1]], ensure_ascii=False)}"
        stream.write((",\n " if number > 1 else "{\n ").encode() + pair.encode())
    stream.write(b"\n}\n" if seen else b"{}\n")


def selected(rows: Rows, inputs: Rows | None, columns: Mapping[str, str]) -> Rows:
    """Return *rows* with *columns*: name in the file -> field.

    A field that a row does not have is the column of the input row at the same place; so is a position or an id that
    the input rows have themselves. The rows raise a UsageError where one has no such field, or does not answer the
    input row at its place.
    """

    def made() -> Iterator[Row]:
        pairs = zip_longest(rows(), inputs()) if inputs is not None else ((row, {}) for row in rows())
        for number, (row, given) in enumerate(pairs, 1):
            if row is None or given is None:
                more = "input rows than predictions" if row is None else "predictions than input rows"
                raise UsageError(f"there are more {more}, of which there are {number - 1:,}: which is which is unknown")
            if given and ID in row and str(row[ID]) not in map(str, given.values()):
                raise UsageError(
                    f"prediction {number} answers the id {row[ID]!r}, which is nowhere in input row {number}: these "
                    "are not the rows that were predicted, or they are in another order"
                )
            yield {name: _value(source, row, given, number) for name, source in columns.items()}

    return made


def _value(source: str, row: Row, given: Row, number: int) -> Any:
    if source in row and not (source in (INDEX, ID) and source in given):
        return row[source]
    if source not in given:
        has = ", ".join(dict.fromkeys([*row, *given]))
        raise UsageError(f"row {number} has no {source!r}; it has: {has}")
    return given[source]


def placed(rows: Rows, ids: Rows, name: str, folder: Path) -> Rows:
    """Return *rows* in the order of *ids*, by what both have in the column *name*.

    Rows that are in order already are passed on; else they are written into *folder* for a while, and memory takes
    about 120 bytes a row. `check_ids` finds what does not fit.
    """
    pairs: Iterator[tuple[Row, Row]] = zip_longest(rows(), ids(), fillvalue={})
    if all(_text(row.get(name)) == _text(wanted.get(name)) for row, wanted in pairs):
        return rows

    def made() -> Iterator[Row]:
        offsets: dict[str, int] = {}
        with tempfile.TemporaryFile(dir=folder) as spool:
            for row in rows():
                offsets[_text(row.get(name))] = spool.tell()
                spool.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            for wanted in ids():
                if (offset := offsets.get(_text(wanted[name]))) is not None:
                    spool.seek(offset)
                    yield {**parse_json(spool.readline()), name: wanted[name]}

    return made


def check_ids(there: Iterable[Any], wanted: Iterable[Any], template: str, *, is_part: bool = False) -> None:
    """Compare the ids of the rows *there* with those that a template *wanted*.

    Where only a part of the rows is predicted, the template may have more.

    Raises:
        UsageError: an id is missing, appears twice, or is on one side only.
    """
    found = _distinct(there, "the rows to predict")
    asked = _distinct(wanted, f"template {template}")
    for side, ids, other in (
        (f"template {template} does not have", found, asked),
        ("no row to predict has", () if is_part else asked, found),
    ):
        if lost := [one for one in ids if one not in other]:
            example = next(iter(other), "")
            more = f" and {len(lost) - _NUM_NAMED:,} more" if len(lost) > _NUM_NAMED else ""
            raise UsageError(
                f"{side} the id {', '.join(map(repr, lost[:_NUM_NAMED]))}{more}; ids are compared as text, and one of "
                f"the others is {example!r}"
            )


def _distinct(ids: Iterable[Any], where: str) -> dict[str, None]:
    found: dict[str, None] = {}
    for number, one in enumerate(ids, 1):
        if one is None or one != one:
            raise UsageError(f"row {number} of {where} has no id")
        if (text := _text(one)) in found:
            raise UsageError(f"row {number} of {where} has the id {text!r} of an earlier row")
        found[text] = None
    return found


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # pandas writes whole numbers so, where one of them is missing
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
