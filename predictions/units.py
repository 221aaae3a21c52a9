"""Units: contiguous ranges of input rows, each written once, as one atomic file.

A folder belongs to one prediction key and holds `layout.json` and `unit-000017.jsonl`
files: one header line, then one JSON row for each input row, in order. A unit is owned by
rows and not by ranks, so the number of tasks may change between attempts. Who may still
write (fencing) is the caller's to check; joining the units is `merge`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DamagedError, NotFoundError, no_room_named
from ..files import canonical_json, locked, make_private_dir, read_json, replacing, write_json
from .rows import PredictionRow

logger = logging.getLogger(__name__)

_FORMAT = 1
_MAX_HEADER_BYTES = 4096
_UNIT_NAME = re.compile(r"unit-(\d{6,})\.jsonl")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The cut of the input rows into units; the last unit may be shorter."""

    num_rows: int
    unit_rows: int

    def __post_init__(self) -> None:
        if self.num_rows < 0 or self.unit_rows < 1:
            raise ValueError(f"a layout needs num_rows >= 0 and unit_rows >= 1, not {self}")

    @property
    def num_units(self) -> int:
        """Return how many units there are; none for no rows."""
        return -(-self.num_rows // self.unit_rows)

    def rows_of(self, number: int) -> range:
        """Return the input rows of a unit."""
        if not 0 <= number < self.num_units:
            raise ValueError(f"there is no unit {number}; the layout has {self.num_units}")
        first = number * self.unit_rows
        return range(first, min(first + self.unit_rows, self.num_rows))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A committed unit, as its header says; `num_bytes` and `sha256` are of the body."""

    number: int
    first_row: int
    num_rows: int
    attempt: int
    task: int
    host: str
    sha256: str
    num_bytes: int
    body_offset: int
    path: Path


def unit_path(folder: Path, number: int) -> Path:
    """Return the file of a unit."""
    return folder / f"unit-{number:06d}.jsonl"


def open_layout(folder: Path, key: str, num_rows: int, unit_rows: int) -> Layout:
    """Return the folder's layout, writing it when this is the first task to come.

    An existing layout wins over another *unit_rows*, so that a run that resumes with
    another size keeps its units.

    Raises:
        DamagedError: the folder was laid out for another key or another number of rows.
    """
    make_private_dir(folder)
    with locked(folder / ".layout.lock"):
        if not (folder / "layout.json").exists():
            layout = Layout(num_rows=num_rows, unit_rows=unit_rows)
            write_json(folder / "layout.json", {"format": _FORMAT, "key": key, **vars(layout)})
            return layout
    found_key, layout = read_layout(folder)
    for what, found, wanted in (("key", found_key, key), ("num_rows", layout.num_rows, num_rows)):
        if found != wanted:
            raise DamagedError(f"{folder / 'layout.json'}: its {what} is {found!r}, not {wanted!r}")
    return layout


def is_unit_folder(folder: Path) -> bool:
    """Return whether *folder* holds the units of a prediction key."""
    return (folder / "layout.json").is_file()


def is_unit(path: Path) -> bool:
    """Return whether a file begins as the units of any prediction key do."""
    with path.open("rb") as stream:
        line = stream.readline(_MAX_HEADER_BYTES)
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(header, dict) and {"format", "key", "unit", "first_row", "sha256"} <= header.keys()


def read_layout(folder: Path) -> tuple[str, Layout]:
    """Return the prediction key and the layout of a folder of units."""
    path = folder / "layout.json"
    try:
        found = read_json(path)
        if found["format"] != _FORMAT:
            raise DamagedError(f"{path}: its format is {found['format']!r}, not {_FORMAT}")
        return str(found["key"]), Layout(num_rows=found["num_rows"], unit_rows=found["unit_rows"])
    except FileNotFoundError as error:
        raise NotFoundError(f"{folder} holds no layout.json: nothing was predicted there yet") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is not a layout: {error!r}; move the folder away and predict again") from error


def write_unit(
    folder: Path,
    layout: Layout,
    unit_number: int,
    rows: Sequence[PredictionRow],
    key: str,
    attempt: int,
    task: int,
) -> Unit:
    """Commit one unit, or return the one that is committed already.

    Two processes that write one unit at the same moment leave one complete unit, of either.

    Raises:
        ValueError: the rows are not exactly those of the unit, in order.
        RunError: a row is no JSON: half a surrogate pair, an unknown type.
        NoRoomError: the disk is full.
    """
    path = unit_path(folder, unit_number)
    try:
        return _read_unit(path, layout, unit_number, key)
    except (FileNotFoundError, DamagedError):
        pass
    wanted = layout.rows_of(unit_number)
    indices = [row.index for row in rows]
    if indices != list(wanted) or not all(type(index) is int for index in indices):
        raise ValueError(f"unit {unit_number} takes the rows {wanted.start} to {wanted.stop - 1}, in order, as ints")
    body = b"".join(row.to_line() for row in rows)
    header = _expected_header(layout, unit_number, key) | {
        "attempt": attempt,
        "task": task,
        "host": socket.gethostname(),
        "sha256": hashlib.sha256(body).hexdigest(),
        "num_bytes": len(body),
    }
    with no_room_named(f"unit {unit_number} of the predictions"), replacing(path) as stream:
        stream.write(canonical_json(header).encode() + b"\n")
        stream.write(body)
    return _read_unit(path, layout, unit_number, key)


def survey_units(folder: Path, layout: Layout, key: str) -> tuple[dict[int, Unit], tuple[str, ...]]:
    """Return the committed units in order, and a line for each other unit file.

    Reads headers and sizes only; the digests are checked when the units are merged.
    """
    faults: list[str] = []
    units = {unit.number: unit for unit in read_units(folder, layout, key, faults)}
    return units, tuple(faults)


def read_units(folder: Path, layout: Layout, key: str, faults: list[str]) -> Iterator[Unit]:
    """Yield the committed units in order; *faults* gets the other unit files."""
    for number in _numbers(folder):
        try:
            yield _read_unit(unit_path(folder, number), layout, number, key)
        except DamagedError as error:
            faults.append(str(error))


def rows_beyond(folder: Path, layout: Layout, key: str) -> dict[Path, int]:
    """Return the unit files of *key* that the layout has no place for.

    Each is there with its number of rows. The layout was changed then, or is damaged.
    """
    found: dict[Path, int] = {}
    for path in (unit_path(folder, number) for number in _numbers(folder) if number >= layout.num_units):
        with path.open("rb") as stream, suppress(ValueError, KeyError, TypeError):
            header = json.loads(stream.readline(_MAX_HEADER_BYTES))
            if header["key"] == key:
                found[path] = int(header["num_rows"])
    return found


def _numbers(folder: Path) -> list[int]:
    with os.scandir(folder) as entries:
        return sorted(int(match[1]) for entry in entries if (match := _UNIT_NAME.fullmatch(entry.name)))


def committed_units(folder: Path, layout: Layout, key: str) -> dict[int, Unit]:
    """Return the committed units by number, and log the files that are not one."""
    units, faults = survey_units(folder, layout, key)
    for fault in faults:
        logger.warning("%s; it does not count", fault)
    return units


def units_of_task(layout: Layout, task: int, num_tasks: int) -> range:
    """Return the units of a task: every *num_tasks*-th, so that all end together."""
    if not 0 <= task < num_tasks:
        raise ValueError(f"task {task} is not one of {num_tasks}")
    return range(task, layout.num_units, num_tasks)


def missing_ranges(layout: Layout, committed: Container[int]) -> tuple[range, ...]:
    """Return the input rows of the units that are not committed, neighbours joined."""
    ranges: list[range] = []
    for number in range(layout.num_units):
        if number in committed:
            continue
        rows = layout.rows_of(number)
        if ranges and ranges[-1].stop == rows.start:
            rows = range(ranges.pop().start, rows.stop)
        ranges.append(rows)
    return tuple(ranges)


def _expected_header(layout: Layout, number: int, key: str) -> dict[str, str | int]:
    rows = layout.rows_of(number)
    return {"format": _FORMAT, "key": key, "unit": number, "first_row": rows.start, "num_rows": len(rows)}


def _read_unit(path: Path, layout: Layout, number: int, key: str) -> Unit:
    """Read a unit's header and check it and the file's size."""
    with path.open("rb") as stream:
        line = stream.readline(_MAX_HEADER_BYTES)
        file_bytes = os.fstat(stream.fileno()).st_size
    try:
        header = json.loads(line)
        for name, wanted in _expected_header(layout, number, key).items():
            if header[name] != wanted:
                raise DamagedError(f"{path}: its {name} is {header[name]!r}, not {wanted!r}")
        unit = Unit(
            number=number,
            first_row=header["first_row"],
            num_rows=header["num_rows"],
            attempt=header["attempt"],
            task=header["task"],
            host=header["host"],
            sha256=header["sha256"],
            num_bytes=header["num_bytes"],
            body_offset=len(line),
            path=path,
        )
    except (ValueError, KeyError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DamagedError(f"{path} has no unit header: {what}") from error
    if file_bytes != unit.body_offset + unit.num_bytes:
        raise DamagedError(f"{path} is incomplete: {file_bytes:,} bytes, not {unit.body_offset + unit.num_bytes:,}")
    return unit
