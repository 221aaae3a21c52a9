"""Merge committed units into one complete file, or name the missing rows.

What a merge found is a `MergeReport`, written beside its output; `shard_merge` ends in
the same way. An incomplete output is named `.partial`: no row is cut or added to fit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ..errors import DamagedError, IncompleteError, no_room_named
from ..files import read_json, sync_dir, temporary_path, write_json
from .units import Layout, Unit, missing_ranges, read_layout, read_units, rows_beyond

_BLOCK_BYTES = 1 << 20
_NUM_NAMED = 5
_NUM_WRITERS = 16


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of each row that is merged; *key* stands for all that decides it.

    *line* returns the new line of a row, from the old one and the row's position.
    """

    key: str
    line: Callable[[bytes, int], bytes]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The report on a merge, and on the faults of its input.

    `num_rows` counts the rows that there should be, `num_written` those in the output.
    Padding is dropped by its place. Duplicate, incomplete and corrupt rows are dropped and counted; they do harm only
    where no intact copy of the row exists. `faults` names the first of what was not used, `sources` says who wrote
    what, and `rest` is the command that computes the missing rows. `change` is the key of what changed each row.
    `order` says by what rows without an index got their positions.
    """

    output: str = ""
    key: str = ""
    change: str = ""
    rest: str = ""
    num_rows: int
    num_written: int
    num_bytes: int
    sha256: str
    missing: tuple[range, ...] = ()
    conflicts: tuple[range, ...] = ()
    num_duplicates: int = 0
    num_padding: int = 0
    num_incomplete: int = 0
    num_corrupt: int = 0
    num_unexpected: int = 0
    is_end_known: bool = True
    order: str = ""
    faults: tuple[str, ...] = ()
    sources: tuple[Mapping[str, str | int], ...] = ()

    @property
    def is_contradictory(self) -> bool:
        """Say whether the sources do not belong together."""
        return bool(self.conflicts or self.num_unexpected)

    @property
    def is_complete(self) -> bool:
        """Say whether every row is there, beyond doubt.

        An incomplete or corrupt line may have been the last row where the number of rows is unknown.
        """
        lost_end = not self.is_end_known and bool(self.num_incomplete or self.num_corrupt)
        return not (self.missing or self.is_contradictory or lost_end)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values; ranges of rows as `format_rows` writes them."""
        ranges = {"missing": format_rows(self.missing), "conflicts": format_rows(self.conflicts)}
        return asdict(self) | ranges | {"is_complete": self.is_complete}

    def __str__(self) -> str:
        parts = [f"{self.num_written:,} of {self.num_rows:,} rows are in {self.output}"]
        if self.missing:
            parts.append(f"missing rows: {format_rows(self.missing, _NUM_NAMED)}")
        if self.conflicts:
            parts.append(f"rows with two different predictions: {format_rows(self.conflicts, _NUM_NAMED)}")
        for what in ("unexpected", "incomplete", "corrupt"):
            if count := getattr(self, f"num_{what}"):
                parts.append(f"{what} rows: {count:,}")
        if self.rest and self.missing:
            parts.append(f"the rest is computed by `{self.rest}`")
        return "; ".join([*parts, *self.faults[:_NUM_NAMED]])

    def writers(self) -> Iterator[str]:
        """Yield a line for each of the first sources: who wrote how much."""
        if self.order:
            yield f"rows are {self.order}"
        for source in self.sources[:_NUM_WRITERS]:
            if "path" in source:
                yield f"{source['path']}: {source['num_rows']:,} rows"
            else:
                where = f"task {source['task']}, attempt {source['attempt']}, on {source['host']}"
                yield f"{where}: {source['num_units']:,} units"
        if len(self.sources) > _NUM_WRITERS:
            yield f"and {len(self.sources) - _NUM_WRITERS:,} more, in the report"


def format_rows(ranges: Iterable[range], limit: int | None = None) -> str:
    """Return the first *limit* ranges of rows as text such as "0-99,107"."""
    ranges = tuple(ranges)
    texts = [str(rows[0]) if len(rows) == 1 else f"{rows[0]}-{rows[-1]}" for rows in ranges[:limit]]
    num_hidden = len(ranges) - len(texts)
    return ",".join(texts) + (f" and {num_hidden:,} more ranges" if num_hidden else "")


def report_path(out_path: Path) -> Path:
    """Return the name of the report on a merge into *out_path*."""
    return out_path.with_suffix(".report.json")


def partial_path(out_path: Path) -> Path:
    """Return the name that an incomplete *out_path* has."""
    return out_path.with_name(out_path.name + ".partial")


def merge_units(folder: Path, out_path: Path, *, change: Change | None = None, rest: str = "") -> MergeReport:
    """Join the units of a folder, in order, checking each one's digest.

    Memory does not grow with the rows. A complete output of the same key and *change* is final: it is
    known by its report, and left alone. A unit whose bytes have changed since they were
    committed is set aside as `.damaged`, so that a resume predicts it again. Several merges into one file may run at
    once. *rest* is the command that computes what is missing.

    Raises:
        IncompleteError: units are missing or damaged; the rest is in `.partial`.
        UsageError: the change failed at a row; nothing is written.
    """
    key, layout = read_layout(folder)
    change_key = change.key if change else ""
    if (done := _complete_report(out_path, key, change_key)) is not None:
        return done
    faults: list[str] = []
    written: dict[tuple[str, int, int], list[int]] = {}  # the numbers of the units of each writer
    digest = hashlib.sha256()
    with writing(out_path) as (stream, temporary):
        for unit in read_units(folder, layout, key, faults):
            start, digest_before = stream.tell(), digest.copy()
            copied = _copy_body(unit, stream, digest) if change is None else _change_body(unit, stream, digest, change)
            if copied:
                written.setdefault((unit.host, unit.task, unit.attempt), []).append(unit.number)
                continue
            stream.seek(start)
            stream.truncate()
            digest = digest_before
            os.replace(unit.path, f"{unit.path}.damaged")
            faults.append(f"{unit.path}.damaged: its bytes have changed since it was committed")
        beyond = rows_beyond(folder, layout, key)
        faults += [f"{path} is a unit of these predictions, and layout.json has no place for it" for path in beyond]
        done_units = set(chain.from_iterable(written.values()))
        report = MergeReport(
            key=key,
            change=change_key,
            rest=rest,
            num_rows=layout.num_rows,
            num_written=sum(len(layout.rows_of(number)) for number in done_units),
            num_bytes=stream.tell(),
            sha256=digest.hexdigest(),
            missing=missing_ranges(layout, done_units),
            num_unexpected=sum(beyond.values()),
            faults=tuple(faults),
            sources=_sources(layout, written),
        )
        if not report.is_complete and (done := _complete_report(out_path, key, change_key)) is not None:
            return done  # another merge was quicker, and saw more
        return settle(report, temporary, stream, out_path)


def _copy_body(unit: Unit, stream: IO[bytes], digest: hashlib._Hash) -> bool:
    """Copy a unit's rows and extend the *digest* of all; say whether they are intact."""
    own_digest = hashlib.sha256()
    with unit.path.open("rb", buffering=0) as source:
        source.seek(unit.body_offset)
        while block := source.read(_BLOCK_BYTES):
            own_digest.update(block)
            digest.update(block)
            stream.write(block)
    return own_digest.hexdigest() == unit.sha256


def _change_body(unit: Unit, stream: IO[bytes], digest: hashlib._Hash, change: Change) -> bool:
    """Do the same with each row changed; what is not intact is not looked into."""
    own_digest = hashlib.sha256()
    with unit.path.open("rb") as source:
        source.seek(unit.body_offset)
        while block := source.read(_BLOCK_BYTES):
            own_digest.update(block)
        if own_digest.hexdigest() != unit.sha256:
            return False
        source.seek(unit.body_offset)
        for number, line in enumerate(source, unit.first_row):
            changed = change.line(line, number)
            digest.update(changed)
            stream.write(changed)
    return True


def _sources(layout: Layout, written: Mapping[tuple[str, int, int], Sequence[int]]) -> tuple[dict[str, str | int], ...]:
    """Return which rows each task wrote, on each host, in each attempt."""
    return tuple(
        {
            "host": host,
            "task": task,
            "attempt": attempt,
            "num_units": len(numbers),
            "rows": format_rows(map(layout.rows_of, numbers)),
        }
        for (host, task, attempt), numbers in sorted(written.items())
    )


def _complete_report(out_path: Path, key: str, change_key: str) -> MergeReport | None:
    """Return the report of the complete output of both keys, if there is one."""
    try:
        found = read_json(report_path(out_path))
        if not found.pop("is_complete") or (found["key"], found["change"]) != (key, change_key):
            return None
        if out_path.stat().st_size != found["num_bytes"]:
            return None
        tuples = {
            "missing": (),
            "conflicts": (),
            "faults": tuple(found["faults"]),
            "sources": tuple(found["sources"]),
        }
        return MergeReport(**found | tuples)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def writing(out_path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Yield a stream for the rows of *out_path*, and its file, whose name is its own.

    `settle` gives it another name; what has none at the end is removed. A full disk is named.
    """
    temporary = temporary_path(out_path)
    try:
        with no_room_named(str(out_path), "try again"), temporary.open("wb") as stream:
            yield stream, temporary
    finally:
        temporary.unlink(missing_ok=True)


def settle(report: MergeReport, temporary: Path, stream: IO[bytes], out_path: Path) -> MergeReport:
    """Write the report and give the merged rows their name, `.partial` if some lack.

    Raises:
        IncompleteError: rows are missing; what is there stays in `.partial`.
        DamagedError: the sources contradict each other; the same.
    """
    stream.flush()
    os.fsync(stream.fileno())
    partial = partial_path(out_path)
    report = replace(report, output=(out_path if report.is_complete else partial).name)
    os.replace(temporary, out_path if report.is_complete else partial)
    sync_dir(out_path.parent)
    write_json(report_path(out_path), report.as_json())
    if not report.is_complete:
        kind = DamagedError if report.is_contradictory else IncompleteError
        raise kind(f"{report}; details in {report_path(out_path)}")
    partial.unlink(missing_ok=True)
    return report
