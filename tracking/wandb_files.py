"""Read and write the `.wandb` files of runs, and mark how much of each was sent.

Such a file is a header of 7 bytes and a log in LevelDB's form: blocks of 32 KiB with parts of records, each part with a
checksum, its length and which part it is. wandb 0.31 has no public reader.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from .. import files

_BLOCK_BYTES = 1 << 15
_HEADER = struct.Struct("<IHB")  # checksum, number of bytes, which part
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_NEWEST = 20_000  # records in which the steps lie that an attempt may repeat: a second of reading


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a file until its end, or until where it was cut."""
    from wandb.proto import wandb_internal_pb2 as protocol  # with all of wandb

    with path.open("rb") as stream:
        for data in _read_log(stream):
            record = protocol.Record()
            record.ParseFromString(data)
            yield record


def _read_log(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the data of each record; the end of a record that was cut is left out."""
    stream.seek(_HEADER.size)  # the file's own header is as long as that of a part
    parts, left = list[bytes](), _BLOCK_BYTES - _HEADER.size
    while True:
        if left < _HEADER.size:
            stream.read(left)
            left = _BLOCK_BYTES
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        checksum, num_bytes, part = _HEADER.unpack(header)
        data = stream.read(num_bytes)
        if len(data) < num_bytes or zlib.crc32(data, zlib.crc32(bytes([part]))) != checksum:
            return
        left -= _HEADER.size + num_bytes
        parts = [*parts, data] if part in (_MIDDLE, _LAST) else [data]
        if part in (_FULL, _LAST):
            yield b"".join(parts)


def write_records(path: Path, like: Path, records: Iterable[Any]) -> None:
    """Write a file with *records* and the header of the file *like*."""
    with like.open("rb") as stream:
        header = stream.read(_HEADER.size)
    with path.open("wb") as stream:
        stream.write(header)
        left = _BLOCK_BYTES - _HEADER.size
        for number, record in enumerate(records):
            record.num = number
            left = _write_record(stream, record.SerializeToString(), left)


def _write_record(stream: IO[bytes], data: bytes, left: int) -> int:
    """Write one record and return how many bytes of the block are left.

    Before it *left* bytes are.
    """
    is_first = True
    while True:
        if left < _HEADER.size:
            stream.write(bytes(left))
            left = _BLOCK_BYTES
        some, data = data[: left - _HEADER.size], data[left - _HEADER.size :]
        part = (_MIDDLE if data else _LAST) if not is_first else (_FIRST if data else _FULL)
        stream.write(_HEADER.pack(zlib.crc32(some, zlib.crc32(bytes([part]))), len(some), part) + some)
        left -= _HEADER.size + len(some)
        is_first = False
        if not data:
            return left


class RowAppender:
    """Adds rows to a file whose own writer, W&B's process, is gone.

    The first row of a file that has none gets *first_step*.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        from wandb.proto import wandb_internal_pb2 as protocol

        self._stream, self._step = path.open("r+b"), first_step
        self.num_rows, end = 0, _HEADER.size
        for data in _read_log(self._stream):
            record, end = protocol.Record(), self._stream.tell()
            record.ParseFromString(data)
            if is_row(record):
                self.num_rows, self._step = self.num_rows + 1, record.history.step.num + 1
        self._stream.truncate(end)  # of a record that was cut
        self._stream.seek(end)
        self._left = _BLOCK_BYTES - end % _BLOCK_BYTES

    def add(self, values: Mapping[str, Any]) -> None:
        """Add what one call of `log` gave, unless that is nothing."""
        from wandb.proto import wandb_internal_pb2 as protocol

        if not values:
            return
        record = protocol.Record()
        record.history.step.num = self._step
        for name, value in {**values, "_step": self._step, "_timestamp": time.time()}.items():
            record.history.item.add(nested_key=[name], value_json=json.dumps(value))
        self._left = _write_record(self._stream, record.SerializeToString(), self._left)
        self._stream.flush()
        self.num_rows, self._step = self.num_rows + 1, self._step + 1

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


@dataclass(frozen=True, kw_only=True)
class Sent:
    """How much of a file a server has.

    *arrived* rows are there. More may be on their way, or were when their sender died: before these the server had
    *base* rows of the run.
    """

    arrived: int = 0
    base: int | None = None
    is_done: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one attempt left of a tracked run.

    It is a file, and a mark that says how much of it was sent. The folder is called by the attempt, such as train-0-1.
    """

    folder: Path

    @property
    def label(self) -> str:
        """The attempt."""
        return self.folder.name

    @property
    def file(self) -> Path | None:
        """The largest file: a start that failed leaves a small one, or the only one none."""
        found = list(self.folder.glob("wandb/*run-*/run-*.wandb"))
        return max(found, key=lambda path: path.stat().st_size, default=None)

    def read(self) -> Sent | None:
        """Return the mark, or None where it was lost."""
        try:
            return Sent(**files.read_json(self.folder / "sent.json"))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, sent: Sent) -> None:
        """Replace the mark."""
        files.write_json(files.make_private_dir(self.folder) / "sent.json", asdict(sent))


def parts_of(folder: Path, run: str) -> list[Part]:
    """Return the parts of a tracked run below a tracking folder, oldest first."""
    found = [
        (path.parent.name.partition("run-")[2], path) for path in folder.glob(f"wandb/*/wandb/*run-*/run-{run}.wandb")
    ]
    folders = dict.fromkeys(path.parent.parent.parent for _, path in sorted(found))
    return [Part(folder=each) for each in folders]


def note_page(folder: Path, run: str, url: str) -> None:
    """Remember below a tracking folder where the server shows a tracked run."""
    path = files.make_private_dir(folder / "wandb") / f"{run}.url"
    if url and not (path.is_file() and path.read_text(encoding="utf-8") == url):
        files.write_text(path, url)


def pages_of(folder: Path) -> Iterator[str]:
    """Yield the remembered addresses of the tracked runs of a tracking folder."""
    for path in sorted(folder.glob("wandb/*.url")):
        yield path.read_text(encoding="utf-8")


def settle(parts: Sequence[Part], num_rows: int) -> dict[str, Sent]:
    """Find how much of each part arrived, and write it down.

    The server has *num_rows* of the run. A run has one writer at a time, so that what it has more than at an earlier
    count came from the part that was then being sent. Where a mark was lost, rows that no other part has sent are its
    own.
    """
    marks = {part.label: part.read() for part in parts}
    for part in parts:
        mark = marks[part.label]
        if mark is not None and mark.base is not None:
            marks[part.label] = replace(mark, arrived=mark.arrived + max(0, num_rows - mark.base), base=None)
    left = num_rows - sum(mark.arrived for mark in marks.values() if mark is not None)
    settled = dict[str, Sent]()
    for part in parts:
        mark = marks[part.label]
        if mark is None:
            mark = Sent(arrived=max(0, min(left, count_rows(part))))
            left -= mark.arrived
        settled[part.label] = mark
        if mark != part.read():
            part.write(mark)
    return settled


def count_rows(part: Part) -> int:
    """Return how many rows the file of *part* has."""
    return sum(is_row(record) for record in read_records(part.file)) if part.file else 0


def last_steps(parts: Iterable[Part]) -> dict[str, int]:
    """Return for each value the last step that *parts*, oldest first, have it of."""
    found = dict[str, int]()
    for path in filter(None, (part.file for part in parts)):
        from wandb.proto import wandb_internal_pb2 as protocol

        with path.open("rb") as stream:
            newest = deque(_read_log(stream), maxlen=_NEWEST)
        for data in newest:
            record = protocol.Record()
            record.ParseFromString(data)
            values = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
            for step in (name for name in values if name.endswith("/step")):
                found |= dict.fromkeys(values, int(values[step].value_json))
    return found


def is_row(record: Any) -> bool:
    """Say whether a record is what one call of `log` wrote."""
    return bool(record.WhichOneof("record_type") == "history")


@contextmanager
def only_writer(folder: Path, run: str) -> Iterator[bool]:
    """Become the only writer of a tracked run; yield whether that was possible."""
    with ExitStack() as stack:
        try:
            path = files.make_private_dir(folder / "wandb") / f"{run}.lock"
            held = stack.enter_context(files.locked(path, wait=False))
        except OSError:  # a file system without locks; `doctor` says so
            held = -1
        yield held is not None
