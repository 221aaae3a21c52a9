"""Merge committed units into one complete file, or name the missing rows.

What a merge found is a `MergeReport`, written beside its output; `shard_merge` ends in
the same way. An incomplete output is named `.partial`: no row is cut or added to fit.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from ..errors import DamagedError, IncompleteError, no_room_named
from ..files import read_json, replacing, sync_dir, write_json
from .units import Unit, missing_ranges, read_layout, survey_units

_BLOCK_BYTES = 1 << 20
_NUM_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The report on a merge, and on the faults of its input.

    `num_rows` counts the rows that there should be, `num_written` those in the output.
    Duplicate, incomplete and corrupt rows are dropped and counted; they do harm only where no
    intact copy of the row exists. `faults` names the first of what was not used.
    """

    output: str = ""
    key: str = ""
    num_rows: int
    num_written: int
    num_bytes: int
    sha256: str
    missing: tuple[range, ...] = ()
    conflicts: tuple[range, ...] = ()
    num_duplicates: int = 0
    num_incomplete: int = 0
    num_corrupt: int = 0
    num_unexpected: int = 0
    is_end_known: bool = True
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
        return "; ".join([*parts, *self.faults[:_NUM_NAMED]])


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


def merge_units(folder: Path, out_path: Path) -> MergeReport:
    """Join the units of a folder, in order, checking each one's digest.

    Memory does not grow with the rows. A complete output of the same key is final: it is
    known by its report, and left alone. A unit whose bytes have changed since they were
    committed is set aside as `.damaged`, so that a resume predicts it again.

    Raises:
        IncompleteError: units are missing or damaged; the rest is in `.partial`.
    """
    key, layout = read_layout(folder)
    if (done := _complete_report(out_path, key)) is not None:
        return done
    units, faults = survey_units(folder, layout, key)
    digest = hashlib.sha256()
    with no_room_named(str(out_path)), replacing(partial_path(out_path)) as stream:
        for unit in list(units.values()):
            start, digest_before = stream.tell(), digest.copy()
            if _copy_body(unit, stream, digest) == unit.sha256:
                continue
            stream.seek(start)
            stream.truncate()
            digest = digest_before
            del units[unit.number]
            os.replace(unit.path, f"{unit.path}.damaged")
            faults += (f"{unit.path}.damaged: its bytes have changed since it was committed",)
        num_bytes = stream.tell()
    report = MergeReport(
        key=key,
        num_rows=layout.num_rows,
        num_written=sum(unit.num_rows for unit in units.values()),
        num_bytes=num_bytes,
        sha256=digest.hexdigest(),
        missing=missing_ranges(layout, units),
        faults=faults,
        sources=_sources(units.values()),
    )
    return settle(report, out_path)


def _copy_body(unit: Unit, stream: IO[bytes], digest: hashlib._Hash) -> str:
    """Copy a unit's rows and extend the *digest* of all; return the unit's own."""
    own_digest = hashlib.sha256()
    with unit.path.open("rb", buffering=0) as source:
        source.seek(unit.body_offset)
        while block := source.read(_BLOCK_BYTES):
            own_digest.update(block)
            digest.update(block)
            stream.write(block)
    return own_digest.hexdigest()


def _sources(units: Iterable[Unit]) -> tuple[dict[str, str | int], ...]:
    """Count the units that each task wrote, on each host, in each attempt."""
    counts = Counter((unit.host, unit.task, unit.attempt) for unit in units)
    return tuple(
        {"host": host, "task": task, "attempt": attempt, "num_units": num_units}
        for (host, task, attempt), num_units in sorted(counts.items())
    )


def _complete_report(out_path: Path, key: str) -> MergeReport | None:
    """Return the report of the complete output of *key*, if there is one already."""
    try:
        found = read_json(report_path(out_path))
        if not found.pop("is_complete") or found["key"] != key:
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


def settle(report: MergeReport, out_path: Path) -> MergeReport:
    """Write the report, and give the `.partial` file its name if all is there.

    Raises:
        IncompleteError: rows are missing; what is there stays in `.partial`.
        DamagedError: the sources contradict each other; the same.
    """
    partial = partial_path(out_path)
    if not report.is_complete:
        report = replace(report, output=partial.name)
        write_json(report_path(out_path), report.as_json())
        kind = DamagedError if report.is_contradictory else IncompleteError
        raise kind(f"{report}; details in {report_path(out_path)}")
    os.replace(partial, out_path)
    sync_dir(out_path.parent)
    report = replace(report, output=out_path.name)
    write_json(report_path(out_path), report.as_json())
    return report
