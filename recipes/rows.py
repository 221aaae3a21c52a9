"""Read data files: JSON lines, CSV, plain text and Parquet, one row at a time."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError

Row = Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file in order; a .txt file has one column, `text`.

    Raises:
        UsageError: the format is unknown, or a line is broken; the message has its number.
    """
    return _reader(path)(path)


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv, ".txt": _text, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UsageError(f"data file {str(path)!r} has an unknown format; known: {', '.join(readers)}")
    return readers[path.suffix.lower()]


def _json_lines(path: Path) -> Iterator[Row]:
    import orjson

    with path.open("rb") as stream:  # binary: str.splitlines would also split at U+2028
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}; mend or remove the line") from error
            if not isinstance(row, dict):
                shown = line[:40].decode(errors="replace").strip()
                raise UsageError(
                    f"{path}, line {number} is no object of columns but {shown!r}; write one object a line"
                )
            yield row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UsageError(
                        f"{path}, line {reader.line_num} has another number of columns than the header "
                        f"({len(reader.fieldnames or ())}); mend the line"
                    )
                yield row
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.reader.line_num} is not CSV: {error}; mend the line") from error
        except UnicodeDecodeError:  # of a whole buffer; reading line by line finds which it is
            for _ in _text(path):
                pass
            raise


def _text(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield {"text": line.rstrip(b"\r\n").decode("utf-8")}
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}, line {number} is not UTF-8: {error}; mend or remove the line") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise UsageError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise UsageError(f"{path} is not a Parquet file: {error}") from error
