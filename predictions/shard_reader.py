"""Find which rows a shard of another trainer holds, and where they lie.

A row is trusted only if all of its line parses; every other line is counted and named.
`shard_merge` puts what was found in order.
"""

from __future__ import annotations

import csv
import json
import shlex
from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np

from ..errors import UsageError
from .rows import INDEX

_READ_BYTES = 1 << 20
MAX_INDEX = (1 << 53) - 1  # what every reader of JSON keeps exact
_MAX_CELL_CHARS = 1 << 30  # the csv module refuses cells above 131,072 characters otherwise
MAX_FAULTS = 20
_SIGNS = {
    b"\x1f\x8b": "is packed; unpack it first: gunzip",
    b"\x28\xb5\x2f\xfd": "is packed; unpack it first: zstd -d",
    b"BZh": "is packed; unpack it first: bunzip2",
    b"\xfd7zXZ": "is packed; unpack it first: unxz",
    b"PK\x03\x04": "is an archive, as torch.save or numpy.savez write; call the former .pt, save arrays as .npy",
    b"\x93NUMPY": "is an array of numpy; call it .npy",
    b"PAR1": "is Parquet; call it .parquet",
    b"\x80": "is a pickle, whose loading could run code; write its rows as JSON, one a line",
    b"[": "is one JSON list; write one object a line, such as with jq -c '.[]'",
}
# By a file's first four bytes: a mark, or NUL beside what begins a row.
_ENCODINGS: dict[str, Callable[[bytes], bool]] = {
    "UTF-32": lambda start: start in (BOM_UTF32_LE, BOM_UTF32_BE),
    "UTF-16": lambda start: start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)),
    "UTF-16LE": lambda start: start[1::2] == b"\0\0" and 0 not in start[::2],
    "UTF-16BE": lambda start: start[::2] == b"\0\0" and 0 not in start[1::2],
}


@dataclass(kw_only=True)
class Shard:
    """The rows of one file, in the order read.

    A row's length counts its newline, also where the last line lacks it. The rows lie in *data* where that is not the
    file itself.
    """

    path: Path
    data: Path | None = None
    header: bytes = b""
    index: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    length: array[int] = field(default_factory=lambda: array("q"))
    num_incomplete: int = 0
    num_corrupt: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._state = self._now()

    def _now(self) -> tuple[int, int, int]:
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def has_changed(self) -> bool:
        """Say whether the file was written to since it was looked at first."""
        return self._now() != self._state

    def accept(self, indices: Sequence[int], offsets: Sequence[int], lines: Sequence[bytes]) -> None:
        """Take in complete rows; only the last line may lack its newline."""
        self.index.extend(indices)
        self.offset.extend(offsets)
        self.length.extend(map(len, lines))
        self.length[-1] += not lines[-1].endswith(b"\n")

    def reject(self, offset: int, line: bytes, reason: object) -> None:
        """Count and name a line that is no row."""
        word = "corrupt" if line.endswith(b"\n") else "incomplete"
        self.num_incomplete += word == "incomplete"
        self.num_corrupt += word == "corrupt"
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{self.path}: byte {offset:,}: {word}: {reason}")


class _Row(Protocol):
    index: int


_Parse = Callable[[bytes], _Row]


def scan_jsonl(path: Path, index_field: str | None) -> Shard:
    """Find the rows of a JSONL shard; without *index_field* the first has index 0.

    An incomplete line that a restarted writer continued is one line of two rows: the second is
    complete and kept. A last line without its newline is complete if it parses. The bytes within
    texts are not looked at, since that would take half as long again; of an index that a line has twice the
    last one counts, as in Python's json.
    """
    _check_sign(path)
    shard = Shard(path=path)
    parse = _parser(index_field)
    with path.open("rb", buffering=_READ_BYTES) as stream:
        offset = len(BOM_UTF8) if stream.read(len(BOM_UTF8)) == BOM_UTF8 else stream.seek(0)
        while lines := stream.readlines(_READ_BYTES):
            *offsets, offset = accumulate(map(len, lines), initial=offset)
            try:
                found = [parse(line) for line in lines]
                indices = (
                    [row.index for row in found]
                    if index_field is not None
                    else range(len(shard.index), len(shard.index) + len(lines))
                )
                shard.accept(indices, offsets, lines)
            except (ValueError, RecursionError):
                for start, line in zip(offsets, lines, strict=True):
                    _scan_line(shard, start, line, parse, index_field)
    return shard


def _parser(index_field: str | None) -> _Parse:
    """Return a parser of the index alone: 3 times as fast as reading the whole row."""
    if index_field is None:
        any_row: Any = msgspec.defstruct("Row", [], gc=False)
        return msgspec.json.Decoder(any_row).decode
    number = Annotated[int, msgspec.Meta(ge=-MAX_INDEX, le=MAX_INDEX)]
    row: Any = msgspec.defstruct("Row", [("index", number, msgspec.field(name=index_field))], gc=False)
    return msgspec.json.Decoder(row).decode


def _index_of(line: bytes, parse: _Parse, index_field: str | None, count: int) -> int:
    """Return the index of a line. NaN and Infinity are data, as in Python's json.

    Raises:
        ValueError: it is no row.
        RecursionError: it has too many brackets within brackets.
    """
    try:
        row = parse(line)
        return row.index if index_field is not None else count
    except ValueError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
    values = json.loads(line.decode(errors="replace"))
    index = values.get(index_field, None) if isinstance(values, dict) else None
    if index_field is None and isinstance(values, dict):
        return count
    if type(index) is not int or abs(index) > MAX_INDEX:
        raise ValueError(f"{index_field!r} is {index!r}, which is no row number")
    return index


def _scan_line(shard: Shard, offset: int, line: bytes, parse: _Parse, index_field: str | None) -> None:
    try:
        shard.accept([_index_of(line, parse, index_field, len(shard.index))], [offset], [line])
    except (ValueError, RecursionError) as error:
        if line.strip():
            shard.reject(offset, line, error)
            if index_field is not None:
                _salvage(shard, offset, line, parse, index_field)


def _salvage(shard: Shard, offset: int, line: bytes, parse: _Parse, index_field: str) -> None:
    # No text of a row can hold the start of one, its quotes would be escaped; an object
    # within a row can, but then one of these stands before it.
    start = line.rfind(b"{" + msgspec.json.encode(index_field))
    if start < 1 or line[:start].rstrip()[-1:] in (b":", b",", b"["):
        return
    with suppress(ValueError, RecursionError):
        index = _index_of(line[start:], parse, index_field, 0)
        shard.accept([index], [offset + start], [line[start:]])


def scan_csv(path: Path, index_field: str | None) -> Shard:
    """Find the rows of a CSV shard; cells may hold newlines within quotes.

    Without *index_field* the first row has index 0. A record that was cut within quotes swallows what follows it,
    often all of the shard's rest: it is reported as incomplete or corrupt.
    """
    _check_sign(path)
    csv.field_size_limit(_MAX_CELL_CHARS)
    shard = Shard(path=path)
    columns: list[str] = []
    column: int | None = None
    for offset, record in _csv_records(path):
        try:
            cells = next(csv.reader([record.decode("utf-8-sig")], strict=True), [])
            if not record.endswith(b"\n"):
                shard.reject(offset, record, "no newline at its end")
            elif not columns:
                columns, shard.header = cells, record
                column = None if index_field is None else _csv_column(path, columns, index_field)
            elif len(cells) != len(columns):
                shard.reject(offset, record, f"{len(cells)} cells, not {len(columns)}")
            else:
                index = len(shard.index) if column is None else _csv_index(cells[column])
                shard.accept([index], [offset], [record])
        except (ValueError, csv.Error) as error:
            shard.reject(offset, record, error)
            if not columns:
                break  # without the header's names the rest says nothing
    return shard


def _check_sign(path: Path) -> None:
    """Refuse by its first bytes what is no text in UTF-8, or one list."""
    with path.open("rb") as stream:
        start = stream.read(16)
    sign = next((sign for sign in _SIGNS if start.lstrip(b" \r\n\t").startswith(sign)), None)
    if sign and (sign != b"[" or path.suffix.lower() != ".csv"):
        raise UsageError(f"{path} {_SIGNS[sign]}")
    start = start[:4]
    found = next((name for name, begins in _ENCODINGS.items() if begins(start)), None)
    if found is not None:
        into = path.with_name(f"{path.stem}-utf8{path.suffix}")
        raise UsageError(
            f"{path} is in {found} and not UTF-8; write it again: iconv -f {found} -t UTF-8 {shlex.quote(str(path))} > "
            f"{shlex.quote(str(into))}"
        )


def index_again(lines: Iterable[bytes], header: bytes) -> tuple[int, int] | None:
    """Return which two of *lines* have the same row number in `index`, if any.

    *header* is that of a CSV file. Lines without such a number are not looked at.
    """
    columns = next(csv.reader([header.decode("utf-8-sig")]), []) if header else []
    if header and INDEX not in columns:
        return None
    parse, none = _parser(INDEX), -MAX_INDEX - 1
    found = array("q")
    for line in lines:
        try:
            if columns:
                found.append(_csv_index(next(csv.reader([line.decode()]))[columns.index(INDEX)]))
            else:
                found.append(_index_of(line, parse, INDEX, 0))
        except (ValueError, RecursionError):
            found.append(none)
    numbers = np.asarray(found)
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero((numbers[order[1:]] == numbers[order[:-1]]) & (numbers[order[1:]] != none))
    return (int(order[again[0]]), int(order[again[0] + 1])) if len(again) else None


def has_fields(names: Sequence[str]) -> str:
    """Say which fields there are, and what to do where none is the index."""
    return (
        f"it has {', '.join(name or repr(name) for name in names)}; name the field of a row's position with --index "
        "FIELD, join the shards in the order in which they are named with --in-file-order, or name what dealt out the "
        "rows with --sampler"
    )


def _csv_column(path: Path, columns: list[str], index_field: str) -> int:
    if index_field not in columns:
        raise UsageError(f"{path} has no column {index_field!r}; {has_fields(columns)}")
    if columns.count(index_field) > 1:
        raise UsageError(f"{path} has more than one column called {index_field!r}; give each a name of its own")
    return columns.index(index_field)


def _csv_index(cell: str) -> int:
    index = int(cell)
    if abs(index) > MAX_INDEX or not cell.isascii() or "_" in cell:
        raise ValueError(f"{cell!r} is no row number")
    return index


def _csv_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each record and its offset: lines are joined while a quote is open."""
    offset, lines, is_open = 0, list[bytes](), False
    with path.open("rb", buffering=_READ_BYTES) as stream:
        for line in stream:
            lines.append(line)
            is_open ^= bool(line.count(b'"') % 2)
            if not is_open:
                record = b"".join(lines)
                yield offset, record
                offset += len(record)
                lines.clear()
    if lines:
        yield offset, b"".join(lines)
