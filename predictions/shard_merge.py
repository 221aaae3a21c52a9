"""Merge the shards of other trainers: one file per rank, rows in any order.

Shards may be damaged in any way. Pass 1 (`scan`) parses every row to learn its index and where it lies; pass 2
gathers the rows' own bytes in order, so that nothing is written in other words. Memory is about 50 bytes a row
of any size. JSONL shards, CSV shards that share one header, or Parquet, .npy and .pt (`array_reader`).
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedError, UsageError, no_room_named
from ..files import TEMPORARY_PREFIX
from .array_reader import SUFFIXES, scan_arrays
from .merge import MergeReport, settle, writing
from .rows import INDEX
from .samplers import Dealing, check_ranks, deal_out
from .shard_files import kinds_of, named_again
from .shard_reader import MAX_FAULTS, MAX_INDEX, Shard, has_fields, index_again, scan_csv, scan_jsonl

_Numbers = NDArray[np.int64]

_GATHER_BYTES = 1 << 20  # what the processor's cache holds: 8 MiB took 1.4 times as long


# Compares merged rows in a file, whose positions are given, with others; returns what it compared, or "".
Check = Callable[[Path, Sequence[int]], str]


def merge_shards(
    paths: Sequence[Path],
    out_path: Path,
    *,
    num_rows: int | None = None,
    index_field: str | None = INDEX,
    dealing: Dealing | None = None,
    check: Check | None = None,
) -> MergeReport:
    """Join shards in the order of their rows' index.

    Without *index_field* rows stay in the order of the shards and lines, or have the positions that *dealing* says,
    which needs *num_rows*. The first copy of a row wins; a second one
    is dropped where it is the same, and makes the result unclean where it is not. Without *num_rows* it is unknown
    whether the last rows are missing. A cut CSV record that is continued by another one can pass for a row; a JSONL
    line cannot. Positions that no index says are assumed: *check* may compare the rows with others, and says what it
    found.

    Raises:
        IncompleteError: rows are missing; the rest is in `.partial`.
        DamagedError: the shards contradict each other or *num_rows*; the same.
        UsageError: there are no shards, or of two formats, or without the index, or one is *out_path*; or they are to
            be joined as they stand, and one is named twice, or lines of them are broken, so that nobody knows how many
            rows these were.
    """
    kinds = kinds_of(paths, out_path)
    if num_rows is not None and num_rows > MAX_INDEX:
        raise UsageError(f"{num_rows:,} rows are more than {MAX_INDEX:,}, which is the most")
    if dealing is not None and num_rows is None:
        raise UsageError(f"--sampler {dealing.sampler} says which row is which by the number of all: give --rows, too")
    index_field = None if dealing is not None else index_field
    if index_field is None and (again := named_again(paths)):
        raise UsageError(f"{again} is named twice, and its rows would get two positions; name every shard once")
    with (
        TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=out_path.parent) as spools,
        no_room_named(str(out_path), "try again"),
    ):
        shards = []
        for number, path in enumerate(paths):
            if kinds & set(SUFFIXES):
                shards.append(scan_arrays(path, index_field, Path(spools, str(number))))
            else:
                shards.append((scan_csv if ".csv" in kinds else scan_jsonl)(path, index_field))
        return _join(shards, out_path, num_rows, index_field, dealing, check)


def _join(
    shards: list[Shard],
    out_path: Path,
    num_rows: int | None,
    index_field: str | None,
    dealing: Dealing | None,
    check: Check | None,
) -> MergeReport:
    padding, order, is_in_file_order = list[tuple[int, bytes]](), "", False
    if dealing is not None:
        assert num_rows is not None, "which was asked for"
        check_ranks([shard.path for shard in shards], [len(shard.index) for shard in shards], num_rows, dealing)
        padding = deal_out(shards, num_rows, dealing)
        order = f"dealt out to {len(shards)} ranks by sampler {dealing}"
    elif index_field is None:
        _number_in_file_order(shards)
        is_in_file_order = True
        order = "in the order of the shards"
    elif not any(shard.index for shard in shards):
        _check_has_index(shards, index_field)
    header = _one_header(shards)
    rows = _Rows(shards)
    if is_in_file_order:
        _check_no_index_again(rows, header)
    ranking = _rank(rows.index, num_rows)
    with writing(out_path) as (stream, temporary):
        sha256 = _write(rows, ranking.kept, header, stream)
        num_bytes = stream.tell()
        if order:
            stream.flush()
            compared = check(temporary, rows.index[ranking.kept].tolist()) if check is not None else ""
            order += f": {compared or 'assumed, since nothing in the rows was compared'}"
            order += _doubt(padding, rows, ranking.kept)
        differing = _differing(rows, ranking)
        if changed := [shard.path for shard in shards if shard.has_changed()]:
            raise DamagedError(f"{changed[0]} was changed while it was merged; merge again when nothing writes to it")
        report = MergeReport(
            num_rows=ranking.num_rows,
            num_written=len(ranking.kept),
            num_bytes=num_bytes,
            sha256=sha256,
            missing=_gaps(rows.index[ranking.kept], ranking.num_rows),
            conflicts=_runs(np.unique(rows.index[ranking.again[differing]])),
            num_duplicates=len(ranking.again),
            num_padding=len(padding),
            num_incomplete=sum(shard.num_incomplete for shard in shards),
            num_corrupt=sum(shard.num_corrupt for shard in shards),
            num_unexpected=len(ranking.unexpected),
            is_end_known=num_rows is not None,
            order=order,
            faults=_faults(shards, rows, ranking, differing),
            sources=rows.sources,
        )
        return settle(report, temporary, stream, out_path)


def _number_in_file_order(shards: Sequence[Shard]) -> None:
    if faults := [fault for shard in shards for fault in shard.faults]:
        raise UsageError(
            f"the shards cannot be joined in file order, since positions after a broken line are unknown: {faults[0]}; "
            "fix or remove the line, or name the field of a row's position with --index FIELD"
        )
    first = 0
    for shard in shards:
        shard.index = array("q", range(first, first + len(shard.index)))
        first += len(shard.index)


def _check_no_index_again(rows: _Rows, header: bytes) -> None:
    """Refuse rows in file order where two say that they are the same one."""
    lines = (line for block in rows.blocks(np.arange(len(rows.index))) for line in rows.lines(block))
    if again := index_again(lines, header):
        first, second = again
        raise UsageError(
            f"{rows.place(first)} and {rows.place(second)} have the same {INDEX!r}: merge rows that say their "
            "positions without --in-file-order, or give a field that says something else another name"
        )


def _doubt(padding: Sequence[tuple[int, bytes]], rows: _Rows, kept: _Numbers) -> str:
    """Say how much padding is not the row that it should repeat, if any."""
    asked = np.array([row for row, _ in padding], dtype=np.int64)
    places = np.searchsorted(rows.index[kept], asked)
    there = [
        place for place, row in enumerate(asked) if places[place] < len(kept) and rows.index[kept[places[place]]] == row
    ]
    lines = rows.lines(kept[places[there]])
    num_other = sum(line != padding[place][1] for place, line in zip(there, lines, strict=True))
    if not num_other:
        return ""
    return (
        f"; {num_other} of {len(padding)} rows of padding are not those that they should repeat: that is right where "
        "answers are drawn or rounded, and else --rows, --sampler, --batch-rows or the order of the shards is wrong"
    )


def _check_has_index(shards: Sequence[Shard], index_field: str) -> None:
    """Refuse intact rows without the field; the report names the broken ones."""
    for shard in shards:
        with shard.path.open("rb") as stream, suppress(ValueError, RecursionError):
            row = json.loads(stream.readline())
            if isinstance(row, dict) and index_field not in row:
                raise UsageError(f"{shard.path} has no field {index_field!r}; {has_fields(list(row))}")


def _one_header(shards: Sequence[Shard]) -> bytes:
    """Return the first header; make the rows of a shard with another one unexpected."""
    header = next((shard.header for shard in shards if shard.header), b"")
    for shard in shards:
        if shard.header not in (header, b""):
            found, wanted = (one.decode(errors="replace") for one in (shard.header, header))
            shard.faults.insert(
                0, f"{shard.path}: its columns are not those of the other shards: {found!r}, and not {wanted!r}"
            )
            shard.index = array("q", [-1]) * len(shard.index)
    return header


class _Rows:
    """All rows that were read; a row's position is its number in that order."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._paths = [shard.path for shard in shards]
        self._data = [shard.data for shard in shards]
        self._ends = np.cumsum([len(shard.index) for shard in shards])
        self.index = _moved([shard.index for shard in shards])
        self._offset = _moved([shard.offset for shard in shards])
        self._length = _moved([shard.length for shard in shards])

    @property
    def sources(self) -> tuple[dict[str, str | int], ...]:
        """Return how many rows each shard holds."""
        counts = np.diff(self._ends, prepend=0).tolist()
        return tuple({"path": str(path), "num_rows": count} for path, count in zip(self._paths, counts, strict=True))

    def place(self, position: int) -> str:
        """Name the file and byte where a row starts."""
        number = int(np.searchsorted(self._ends, position, side="right"))
        path = self._paths[number]
        if self._data[number] is None:
            return f"{path}: byte {self._offset[position]:,}"
        before = int(self._ends[number - 1]) if number else 0
        return f"{path}: its row {position - before:,}"

    def blocks(self, positions: _Numbers) -> Iterator[_Numbers]:
        """Cut *positions* into blocks whose lines take about 1 MiB."""
        totals = np.cumsum(self._length[positions])
        num_bytes = int(totals[-1]) if len(totals) else 0
        yield from np.split(positions, np.searchsorted(totals, np.arange(_GATHER_BYTES, num_bytes, _GATHER_BYTES)))

    def lines(self, positions: _Numbers) -> list[bytes]:
        """Return the lines at *positions*, without newlines; one file is open at a time."""
        lines = [b""] * len(positions)
        shard_of = np.searchsorted(self._ends, positions, side="right")
        for number in np.unique(shard_of).tolist():
            slots = np.flatnonzero(shard_of == number)
            starts = self._offset[positions[slots]]
            stops = starts + self._length[positions[slots]] - 1
            with (
                (self._data[number] or self._paths[number]).open("rb") as stream,
                mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data,
            ):
                for slot, start, stop in zip(slots.tolist(), starts.tolist(), stops.tolist(), strict=True):
                    lines[slot] = data[start:stop]
        return lines


def _moved(columns: Sequence[array[int]]) -> _Numbers:
    """Join columns and empty them, so that the rows do not lie in memory twice."""
    joined = np.concatenate([np.asarray(column) for column in columns])
    for column in columns:
        del column[:]
    return joined


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """Positions of rows: kept in order, repeated (and what each repeats), others."""

    num_rows: int
    kept: _Numbers
    again: _Numbers
    first: _Numbers
    unexpected: _Numbers


def _rank(index: _Numbers, num_rows: int | None) -> _Ranking:
    order = np.argsort(index, kind="stable")
    ranked = index[order]
    if num_rows is None:
        num_rows = max(0, int(ranked[-1]) + 1) if len(ranked) else 0
    low, high = np.searchsorted(ranked, [0, num_rows])
    unexpected = np.concatenate([order[:low], order[high:]])
    order, ranked = order[low:high], ranked[low:high]
    is_first = np.ones(len(ranked), dtype=bool)
    is_first[1:] = ranked[1:] != ranked[:-1]
    kept = order[is_first]
    first = kept[np.cumsum(is_first)[~is_first] - 1]
    return _Ranking(num_rows=num_rows, kept=kept, again=order[~is_first], first=first, unexpected=unexpected)


def _write(rows: _Rows, kept: _Numbers, header: bytes, stream: IO[bytes]) -> str:
    """Write the kept rows; return their sha256."""
    digest = hashlib.sha256()

    def put(block: bytes) -> None:
        digest.update(block)  # both free the interpreter's lock, so that gathering continues
        stream.write(block)

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(put, header)
        for positions in rows.blocks(kept):
            block = b"\n".join([*rows.lines(positions), b""])
            pending.result()
            pending = pool.submit(put, block)
        pending.result()
    return digest.hexdigest()


def _gaps(index: _Numbers, num_rows: int) -> tuple[range, ...]:
    """Return what is absent from the sorted, distinct *index*."""
    edges = np.concatenate([[-1], index, [num_rows]])
    gaps = np.flatnonzero(np.diff(edges) > 1)
    return tuple(
        range(last + 1, stop) for last, stop in zip(edges[gaps].tolist(), edges[gaps + 1].tolist(), strict=True)
    )


def _differing(rows: _Rows, ranking: _Ranking) -> _Numbers:
    """Return which of the repeated rows are not what they repeat."""
    differing: list[int] = []
    done = 0
    for again in rows.blocks(ranking.again):
        first = ranking.first[done : done + len(again)]
        pairs = zip(rows.lines(again), rows.lines(first), strict=True)
        differing += [done + slot for slot, (line, first_line) in enumerate(pairs) if line != first_line]
        done += len(again)
    return np.array(differing, dtype=np.int64)


def _runs(numbers: _Numbers) -> tuple[range, ...]:
    """Return sorted, distinct numbers as ranges."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    runs = np.split(numbers, starts[1:]) if len(numbers) else []
    return tuple(range(int(run[0]), int(run[-1]) + 1) for run in runs)


def _faults(shards: Sequence[Shard], rows: _Rows, ranking: _Ranking, differing: _Numbers) -> tuple[str, ...]:
    """Name the first rows that were not used, the gravest first, and their places."""
    faults = []
    for slot in differing[:MAX_FAULTS].tolist():
        again, first = int(ranking.again[slot]), int(ranking.first[slot])
        faults.append(f"{rows.place(again)}: row {rows.index[again]} differs from the one at {rows.place(first)}")
    for position in ranking.unexpected[:MAX_FAULTS].tolist():
        faults.append(f"{rows.place(position)}: row {rows.index[position]} is none of the {ranking.num_rows:,} rows")
    faults += [fault for shard in shards for fault in shard.faults]
    return tuple(faults[:MAX_FAULTS])
