"""Read elements of source tensors into buffers.

Their files stay open as long as descriptors last.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DamagedError
from ...remote import Place, RemotePath, map_in_threads, read_ranges
from ..formats.tensors import DTYPES, Segment, SourceTensor, cut
from .cast import bits_of, is_nan
from .torch_cast import Bytes, copier

if TYPE_CHECKING:
    from .checksums import CrcRecorder

_COMPARED_ELEMENTS = 256
_SPARE_DESCRIPTORS = 256  # for the files that are written, and what else the process has open


class Reader:
    """Reads by position, for one thread.

    A checkpoint of 1,000 ranks has more files than a process may hold open, so the least used are closed. *sums*
    gets all that is read.
    """

    def __init__(self, max_open: int = 64, sums: CrcRecorder | None = None) -> None:
        self._sums = sums
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._max_open = max_open

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, tensor: SourceTensor, first: int, count: int, buffer: Bytes | None = None) -> Bytes:
        """Return the bytes of *count* elements from *first* on.

        They are in *buffer* where one is given.

        Raises:
            DamagedError: a file is gone or became shorter since it was looked into.
        """
        element_bytes = DTYPES[tensor.dtype].num_bytes
        target = np.empty(count * element_bytes, np.uint8) if buffer is None else buffer[: count * element_bytes]
        whole, begin = target.data, 0
        far: list[tuple[RemotePath, int, int]] = []
        far_views: list[memoryview] = []
        for segment in cut(tensor.segments, element_bytes, first, count):
            view = whole[begin : begin + segment.num_elements * element_bytes]
            begin += len(view)
            if isinstance(segment.path, Path):
                self._fill(segment.path, view, segment.offset_bytes)
                self._add(segment.path, segment.offset_bytes, view)
            else:
                far.append((segment.path, segment.offset_bytes, segment.offset_bytes + len(view)))
                far_views.append(view)
        for (path, offset, _), view, content in zip(far, far_views, read_ranges(far) if far else (), strict=True):
            view[:] = content
            self._add(path, offset, view)
        return target

    def _add(self, path: Place, offset: int, view: memoryview) -> None:
        if self._sums is not None:
            self._sums.add(path, offset, view)

    def _fill(self, path: Path, view: memoryview, offset: int) -> None:
        descriptor = self._open(path)
        while view:
            num_bytes = os.preadv(descriptor, [view], offset)
            if num_bytes == 0:
                raise DamagedError(f"{path}: became shorter while it was read")
            view, offset = view[num_bytes:], offset + num_bytes

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            if len(self._descriptors) >= self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            try:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                raise DamagedError(f"{path}: was removed since the checkpoint was opened") from error
        self._descriptors.move_to_end(path)
        return self._descriptors[path]


def raise_descriptor_limit(num_files: int, num_workers: int) -> int:
    """Return how many files each worker may hold open.

    The process's own limit is raised as far as it goes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_files * num_workers + _SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = needed if soft == resource.RLIM_INFINITY else soft - _SPARE_DESCRIPTORS
    return max(4, room // num_workers)


def check_working_copies(tensors: Sequence[SourceTensor]) -> None:
    """Compare the ends of each fp32 master with its 16-bit copy.

    The copy is the one that the model trained with. They are equal in every intact checkpoint of stages 1 and 2, so a
    layout that a later DeepSpeed changes is found before it becomes a model that loads and is wrong.

    Raises:
        DamagedError: they differ; the message names the parameter.
    """
    map_in_threads(
        _check_ends, (tensor for tensor in tensors if tensor.working_copy is not None and tensor.num_elements)
    )


def _check_ends(tensor: SourceTensor) -> None:
    count = min(_COMPARED_ELEMENTS, tensor.num_elements)
    with Reader() as reader:
        for first in sorted({0, tensor.num_elements - count}):
            check_working_copy(reader, tensor, first, count)


def check_working_copy(reader: Reader, tensor: SourceTensor, first: int, count: int) -> None:
    """Compare *count* elements from *first* on.

    Raise `DamagedError` where master and copy differ.
    """
    assert tensor.working_copy is not None
    master, copy = reader.read(tensor, first, count), reader.read(tensor.working_copy, first, count)
    cast = np.empty_like(copy)
    if tensor.dtype == tensor.working_copy.dtype:
        cast[:] = master
    else:
        copier()(master, tensor.dtype, cast, tensor.working_copy.dtype)
    found, expected = bits_of(cast, tensor.working_copy.dtype), bits_of(copy, tensor.working_copy.dtype)
    are_numbers = ~(is_nan(found, tensor.working_copy.dtype) & is_nan(expected, tensor.working_copy.dtype))
    if np.any((found != expected) & are_numbers):
        raise DamagedError(
            f"{tensor.segments[0].path}: the master weights of {tensor.name!r} are not those that "
            "the model trained with; the file is damaged, or of an unknown version of DeepSpeed"
        )


def segments_by_file(tensors: Sequence[SourceTensor]) -> dict[Place, list[Segment]]:
    """Return every file that *tensors* lie in, with what lies in it.

    Files of what is added to the tensors are included.
    """
    found: dict[Place, list[Segment]] = {}
    for tensor in tensors:
        for segment in (segment for part in (tensor, *tensor.changes) for segment in part.segments):
            found.setdefault(segment.path, []).append(segment)
    return found
