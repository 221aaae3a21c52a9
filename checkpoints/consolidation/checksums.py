"""CRC-32 of all that was read, against the zip directories of the files.

The order of reading does not matter. A consolidation reads every byte of a record of weights once, in pieces that
threads and tasks of an array share. The CRCs of neighbouring pieces combine into one, so that a flipped bit is found
without reading anything twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from isal.isal_zlib import crc32, crc32_combine  # 15 times as fast as zlib's

from ...errors import DamagedError
from ...remote import Place, map_in_threads
from ..formats.tensors import Segment, SourceTensor
from ..formats.torch_zip import Record, open_archive
from .reader import Reader, segments_by_file
from .torch_cast import Bytes

Span = tuple[int, int, int]  # first byte in the file, the one after the last, CRC-32
Spans = Mapping[str, Sequence[Span]]  # by the file's name

_BLOCK_BYTES = 4 << 20


class CrcRecorder:
    """Recorder of the CRC-32 of all that one thread reads; give it to a `Reader`."""

    def __init__(self) -> None:
        self._spans: defaultdict[Place, list[Span]] = defaultdict(list)

    def add(self, path: Place, offset_bytes: int, content: memoryview | bytes) -> None:
        self._spans[path].append((offset_bytes, offset_bytes + len(content), crc32(content)))

    def take(self) -> Spans:
        """Return what was added since the last call."""
        taken = {str(path): joined(spans) for path, spans in self._spans.items()}
        self._spans.clear()
        return taken


def all_of(parts: Iterable[Spans]) -> Spans:
    """Return the spans of several readers together."""
    found: defaultdict[str, list[Span]] = defaultdict(list)
    for part in parts:
        for name, spans in part.items():
            found[name] += map(tuple, spans)  # type: ignore[arg-type]  # lists, where they were JSON
    return {name: joined(spans) for name, spans in found.items()}


def joined(spans: Iterable[Span]) -> list[Span]:
    """Return *spans* in order, those that meet made one."""
    found: list[Span] = []
    for begin, end, crc in sorted(spans):
        if found and found[-1][1] == begin:
            first, _, before = found[-1]
            found[-1] = (first, end, crc32_combine(before, crc, end - begin))
        else:
            found.append((begin, end, crc))
    return found


def check_records(tensors: Sequence[SourceTensor], spans: Spans) -> None:
    """Compare every record that *tensors* lie in with its checksum.

    What *spans* lack of it is read now. A safetensors file has no checksums, nor has what torch saved after
    `set_crc32_options(False)`.

    Raises:
        DamagedError: a record is not what was written; its file is named.
    """
    files = segments_by_file(tensors).items()
    map_in_threads(lambda item: _check_file(*item, spans.get(str(item[0]), ())), files)


def _check_file(path: Place, segments: Sequence[Segment], spans: Sequence[Span]) -> None:
    if path.name.endswith((".safetensors", ".distcp")):
        return
    records = open_archive(path).records()
    begins = [record.offset_bytes for record in records]
    for number in sorted({bisect_right(begins, segment.offset_bytes) - 1 for segment in segments}):
        if records[number].crc32 and _crc_of(path, records[number], spans) != records[number].crc32:
            raise DamagedError(
                f"{path}: {records[number].num_bytes} bytes from {begins[number]} on do not have the checksum that was "
                "written with them; the file is damaged, copy it again or use an older checkpoint"
            )


def _crc_of(path: Place, record: Record, spans: Sequence[Span]) -> int:
    crc, position, end = 0, record.offset_bytes, record.offset_bytes + record.num_bytes
    with Reader() as reader:
        for first, after, part in (*spans, (end, end, 0)):
            if not position <= first <= after <= end:
                continue  # of another record, or read before: a weight under two names
            crc = crc32_combine(_read_on(reader, path, position, first, crc), part, after - first)
            position = after
    return crc


def _read_on(reader: Reader, path: Place, begin: int, end: int, crc: int) -> int:
    """Return *crc* continued by the bytes from *begin* to *end*: padding, mostly."""
    for first in range(begin, end, _BLOCK_BYTES):
        crc = crc32(_bytes(reader, path, first, min(end, first + _BLOCK_BYTES)), crc)
    return crc


def _bytes(reader: Reader, path: Place, begin: int, end: int) -> Bytes:
    segment = Segment(path=path, offset_bytes=begin, num_elements=end - begin)
    whole = SourceTensor(name="", shape=(end - begin,), dtype="uint8", segments=(segment,))
    return reader.read(whole, 0, end - begin, np.empty(end - begin, np.uint8))
