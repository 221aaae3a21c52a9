"""Read data files, one row at a time.

They are JSON, CSV, tabs, plain text and Parquet, and those but the last also as gzip or zstd.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ...errors import UsageError
from ...files import parse_json
from .encodings import check_sign, converted, decoding_fault
from .squad import is_nested, nested_rows

Row = Mapping[str, Any]
PACKED = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"
_CELL_BYTES = 1 << 27  # a cell with more is one whose quote was never closed


def read_rows(path: Path, name: str | None = None) -> Iterator[Row]:
    """Yield the rows of a data file in order; a .txt file has one column, `text`.

    Messages call the file *name*, which is its path where it is not given.

    Raises:
        UsageError: the format is unknown, or a line is broken; the message has its number.
    """
    return _READERS[format_of(path, name or str(path))](path, name or str(path))


def format_of(path: Path, name: str) -> str:
    """Return the format of a data file, such as `.csv`, also of a packed one.

    Raises:
        UsageError: it is not known; the message says how to convert it.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_packed = suffixes[-1:] and suffixes[-1] in PACKED
    suffix = "".join(suffixes[-2:-1] if is_packed else suffixes[-1:])
    if suffix not in _READERS or (is_packed and suffix == ".parquet"):
        known = f"known: {', '.join(FORMATS)}, and all but the last with {' or '.join(PACKED)} behind"
        advice = _CONVERSIONS.get(suffixes[-1] if suffixes else "", "")
        raise UsageError(f"data file {name!r} has an unknown format; {known}{advice}")
    return suffix


# What the files of other formats take to be read.
_CONVERSIONS = {
    **dict.fromkeys((".bz2", ".xz", ".zip", ".tar"), "; unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "; save the sheet as CSV in UTF-8"),
    ".arrow": "; write it as Parquet, with `datasets`: Dataset.from_file(...).to_parquet(...)",
}


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Yield the unpacked bytes of a file."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as stream:
                yield cast("IO[bytes]", stream)
        elif suffix == ".zst":
            pyarrow = _pyarrow(name)
            with io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"), 1 << 20) as stream:
                yield stream
        else:
            with path.open("rb") as stream:
                yield stream
    except (EOFError, OSError, zlib.error) as error:
        if suffix not in PACKED or isinstance(error, FileNotFoundError):
            raise
        raise UsageError(f"{name} cannot be unpacked: {error}; it is damaged, or was cut off") from error


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UsageError(f"reading {name} needs pyarrow: pip install 'sousbatch[data]'") from error
    return pyarrow


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line; only newlines end one."""
    with _opened(path, name) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                check_sign(path, name, line)
                line = line.removeprefix(_BOM)
            if b"\0" in line:
                raise UsageError(_binary(name, number))
            yield number, line


def _decoding_fault(path: Path, name: str, number: int, line: bytes) -> str:
    with _opened(path, name) as stream:
        return decoding_fault(path, name, number, line, stream)


def _binary(name: str, number: int) -> str:
    return (
        f"{name}, line {number} holds a NUL byte, which no text has; the file is binary, in UTF-16, or was damaged "
        "while it was written: write it again as UTF-8"
    )


def _json(path: Path, name: str) -> Iterator[Row]:
    """Read one object a line, or a file that is one list of objects.

    In a .json file the list may also be the `data` of one object, such as that of SQuAD.
    """
    with _opened(path, name) as stream:
        start = stream.read(1 << 16).removeprefix(_BOM).lstrip()
    if start.startswith(b"["):
        return _json_list(path, name)
    first, _, more = start.partition(b"\n")
    is_lines = (more.strip() and _is_object(first)) or not start.startswith(b"{")
    return _json_lines(path, name) if is_lines or format_of(path, name) == ".jsonl" else _json_object(path, name)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _json_object(path: Path, name: str) -> Iterator[Row]:
    """Read a file that may be one object; what is none has an object a line."""
    with _opened(path, name) as stream:
        content = stream.read().removeprefix(_BOM)
    try:
        whole = parse_json(content)
    except ValueError:
        yield from _json_lines(path, name)
        return
    data = whole.get("data")
    is_list = isinstance(data, list) and all(isinstance(one, dict) for one in data)
    if is_list and is_nested(data):
        yield from nested_rows(data, name)
    else:
        yield from data if is_list else [whole]


def _json_list(path: Path, name: str) -> Iterator[Row]:
    """Read a whole list; a file of many GB is better written one object a line."""
    with _opened(path, name) as stream:
        content = stream.read().removeprefix(_BOM)
    try:
        rows = parse_json(content)
    except ValueError as error:
        for _ in _lines(path, name):  # which finds what is no UTF-8
            pass
        raise UsageError(
            f"{name} starts as a JSON list and is none: {error}; fix it, or write one object a line"
        ) from error
    yield from _checked_list(rows, name)


def _checked_list(rows: list[Any], name: str) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(
                f"{name}, item {number} is not an object of columns but {str(row)[:40]!r}; write a list of objects"
            )
        yield row


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    for number, line in _lines(path, name):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if fault := _decoding_fault(path, name, number, line):
                raise UsageError(fault) from error
            cut = "" if line.endswith(b"\n") else " (the last line, which no newline ends: it may have been cut off)"
            raise UsageError(f"{name}, line {number}{cut} is not JSON: {error}; fix or remove the line") from error
        if not isinstance(row, dict):
            shown = line[:40].decode(errors="replace").strip()
            raise UsageError(
                f"{name}, line {number} is not an object of columns but {shown!r}; write one object a "
                "line, or one list of objects"
            )
        yield row


def _csv(path: Path, name: str, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(_CELL_BYTES)
    begin = 1
    with _opened(path, name) as stream:
        check_sign(path, name, stream.read(2))
    with _opened(path, name) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(_text_lines(text, name), strict=True, delimiter=delimiter)
        try:
            header = next(reader, [])
            _check_header(path, name, header, delimiter)
            width = len(header)
            while True:
                begin = reader.line_num + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if len(cells) == width:
                    yield dict(zip(header, cells, strict=True))
                elif cells:
                    raise UsageError(
                        f"{name}, line {begin} has another number of columns than the header ({width}), "
                        f"which is {len(cells)}; fix the line, or put quotes around a cell that holds {delimiter!r}"
                    )
        except csv.Error as error:
            raise UsageError(_csv_fault(name, begin, reader.line_num, str(error))) from error
        except UnicodeDecodeError:  # of a whole buffer; reading line by line finds which it is
            for number, line in _lines(path, name):
                if fault := _decoding_fault(path, name, number, line):
                    raise UsageError(fault) from None
            raise


def _csv_fault(name: str, begin: int, end: int, reason: str) -> str:
    if "unexpected end" in reason or "field larger" in reason:
        advice = "close it, or double a quote that a cell holds"
        return f"{name}, line {begin} is not CSV: it opens a quote that nothing closes; {advice}"
    lines = f"line {begin}" if begin >= end else f"lines {begin} to {end}"
    return f"{name}, {lines} is not CSV: {reason}; fix the line: a quote in a cell is doubled, within quotes"


def _text_lines(stream: io.TextIOWrapper, name: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if "\0" in line:
            raise UsageError(_binary(name, number))
        yield line


def _check_header(path: Path, name: str, header: Sequence[str], delimiter: str) -> None:
    """Refuse names that come twice, and a file with another delimiter.

    Such a file has one column, whose name holds it.
    """
    twice = sorted({one for one in header if one and header.count(one) > 1})
    if twice:
        raise UsageError(f"{name} has more than one column called {twice[0]!r}; give each column a name of its own")
    signs = [sign for sign in ";\t|," if sign != delimiter and len(header) == 1 and sign in header[0]]
    if signs and not (signs[0] == "," and delimiter == "\t"):
        advice = "call it .tsv" if signs[0] == "\t" else _with_commas(path, signs[0])
        raise UsageError(f"{name} has its columns apart by {signs[0]!r}: {header[0][:80]!r}; {advice}")


def _with_commas(path: Path, delimiter: str) -> str:
    """Return the command that writes a file of columns apart by *delimiter* as CSV."""
    code = f"csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={json.dumps(delimiter)}))"
    command = ["python", "-c", f"import csv,sys; {code}"]
    return f"write it with commas: {converted(path, shlex.join(command), 'commas')}"


def _text(path: Path, name: str) -> Iterator[Row]:
    for number, line in _lines(path, name):
        try:
            yield {"text": line.rstrip(b"\r\n").decode("utf-8")}
        except UnicodeDecodeError as error:
            raise UsageError(_decoding_fault(path, name, number, line)) from error


def _parquet(path: Path, name: str) -> Iterator[Row]:
    pyarrow = _pyarrow(name)
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        others = [column.name for column in file.schema_arrow if not _is_plain(pyarrow.types, column.type)]
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                row.update((name, _as_json(row[name])) for name in others)
                yield row
    except (pyarrow.ArrowException, OSError) as error:  # a page that was cut off is an OSError without the file's name
        raise UsageError(f"{name} is not a Parquet file, or a damaged one: {error}") from error


def _is_plain(types: Any, kind: Any) -> bool:
    return any(
        is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_integer, types.is_floating)
    )


def _as_json(value: Any) -> Any:
    """Return a value of Parquet as JSON can say it.

    Dates and the like are text; bytes stay bytes.
    """
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return value if value is None or isinstance(value, (str, bool, int, float, bytes)) else str(value)


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    **{".jsonl": _json, ".json": _json, ".csv": _csv, ".tsv": lambda path, name: _csv(path, name, "\t")},
    **{".txt": _text, ".parquet": _parquet},
}
FORMATS = tuple(_READERS)
