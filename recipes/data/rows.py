"""Read data files: JSON lines, CSV, plain text and Parquet, one row at a time."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...files import parse_json
from .squad import read_nested

Row = Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file in order; a .txt file has one column, `text`.

    Raises:
        UsageError: the format is unknown, or a line is broken; the message has its number.
    """
    return _reader(path)(path)


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    readers = {".jsonl": _json, ".json": _json, ".csv": _csv, ".txt": _text, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        known = f"known: {', '.join(readers)}"
        raise UsageError(f"data file {str(path)!r} has an unknown format; {known}{_conversion(path, suffix)}")
    return readers[suffix]


# What the files of other formats take to be read; FILE is the file as a shell reads it.
_CONVERSIONS = {
    ".gz": "unpack it: gunzip -k FILE",
    ".bz2": "unpack it: bunzip2 -k FILE",
    ".xz": "unpack it: unxz -k FILE",
    ".zst": "unpack it: unzstd FILE",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV in UTF-8"),
    ".arrow": "write it as Parquet, with `datasets`: Dataset.from_file(...).to_parquet(...)",
}


def _conversion(path: Path, suffix: str) -> str:
    if suffix == ".tsv":
        return "; " + _with_commas(path, "\t", path.with_suffix(".csv"))
    return f"; {_CONVERSIONS[suffix].replace('FILE', shlex.quote(str(path)))}" if suffix in _CONVERSIONS else ""


def _with_commas(path: Path, delimiter: str, target: Path) -> str:
    """Return the command that writes a file of columns apart by *delimiter* as CSV."""
    code = f"csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={json.dumps(delimiter)}))"
    command = ["python", "-c", f"import csv,sys; {code}"]
    places = f"< {shlex.quote(str(path))} > {shlex.quote(str(target))}"
    return f"write it with commas: {shlex.join(command)} {places}"


def _json(path: Path) -> Iterator[Row]:
    """Read one object a line, a file that is one list of objects, or the nested JSON of SQuAD."""
    with path.open("rb") as stream:
        start = stream.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    return _json_list(path) if start.startswith(b"[") else read_nested(path, start) or _json_lines(path)


def _json_list(path: Path) -> Iterator[Row]:
    """Read a whole list; a file of many GB is better written one object a line."""
    try:
        rows = parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise UsageError(
            f"{path} starts as a JSON list and is none: {error}; fix it, or write one object a line"
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(
                f"{path}, item {number} is not an object of columns but {str(row)[:40]!r}; write a list of objects"
            )
        yield row


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:  # binary: str.splitlines would also split at U+2028
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                _check_encoding(path, number, line)
                raise UsageError(f"{path}, line {number} is not JSON: {error}; fix or remove the line") from error
            if not isinstance(row, dict):
                shown = line[:40].decode(errors="replace").strip()
                raise UsageError(
                    f"{path}, line {number} is not an object of columns but {shown!r}; write one object a "
                    "line, or one list of objects"
                )
            yield row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            _check_delimiter(path, reader.fieldnames or ())
            for row in reader:
                if None in row or None in row.values():
                    raise UsageError(
                        f"{path}, line {reader.line_num} has another number of columns than the header "
                        f"({len(reader.fieldnames or ())}); fix the line"
                    )
                yield row
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.reader.line_num} is not CSV: {error}; fix the line") from error
        except UnicodeDecodeError:  # of a whole buffer; reading line by line finds which it is
            for _ in _text(path):
                pass
            raise


def _text(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            _check_encoding(path, number, line)
            yield {"text": line.rstrip(b"\r\n").decode("utf-8")}


def _check_encoding(path: Path, number: int, line: bytes) -> None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else _encoding_of(line)
        target = shlex.quote(f"{path.with_suffix('')}-utf8{path.suffix}")
        raise UsageError(
            f"{path}, line {number} is not UTF-8: {error}; fix the line, or write the file again if all of it is in "
            f"another encoding, such as: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {target}"
        ) from error


def _encoding_of(line: bytes) -> str:
    """Guess the encoding of a line that is not UTF-8.

    Korean bytes are all pairs, which Western text hardly is.
    """
    with suppress(UnicodeDecodeError):
        if any("\uac00" <= sign <= "\ud7a3" for sign in line.decode("cp949")):
            return "CP949"
    return "WINDOWS-1252"


def _check_delimiter(path: Path, columns: Sequence[str]) -> None:
    """Refuse a file of one column whose name holds another delimiter.

    Such a file was not written with commas.
    """
    found = next((sign for sign in ";\t|" if len(columns) == 1 and sign in columns[0]), None)
    if found is not None:
        target = path.with_name(f"{path.stem}-commas.csv")
        raise UsageError(
            f"{path} has its columns apart by {found!r}: {columns[0][:80]!r}; {_with_commas(path, found, target)}"
        )


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:  # a page that was cut off is an OSError without the file's name
        raise UsageError(f"{path} is not a Parquet file, or a damaged one: {error}") from error
