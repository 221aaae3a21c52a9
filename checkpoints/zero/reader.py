"""Read elements of source tensors into torch tensors, from files that stay open. Runs on the node only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DamagedError
from .source import DTYPES, SourceTensor, cut

if TYPE_CHECKING:
    import torch

_TWIN_ELEMENTS = 256


class Reader:
    """Reads by position, so that any number of threads may share one."""

    def __init__(self, descriptors: Mapping[Path, int]) -> None:
        self._descriptors = descriptors

    def read(self, tensor: SourceTensor, first: int, count: int, *, buffer: bytearray | None = None) -> torch.Tensor:
        """Return *count* elements from *first* on, as a view of *buffer* where one is given.

        Raises:
            DamagedError: a file became shorter since it was opened.
        """
        import torch

        element_bytes = DTYPES[tensor.dtype].num_bytes
        buffer = bytearray(count * element_bytes) if buffer is None else buffer
        begin = 0
        with memoryview(buffer) as view:
            for segment in cut(tensor.segments, element_bytes, first, count):
                end = begin + segment.num_elements * element_bytes
                self._fill(segment.path, view[begin:end], segment.offset_bytes)
                begin = end
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        return torch.frombuffer(buffer, dtype=dtype, count=count)

    def _fill(self, path: Path, view: memoryview, offset: int) -> None:
        while view:
            num_bytes = os.preadv(self._descriptors[path], [view], offset)
            if num_bytes == 0:
                raise DamagedError(f"{path}: became shorter while it was read")
            view, offset = view[num_bytes:], offset + num_bytes


@contextmanager
def opened(tensors: Iterable[SourceTensor]) -> Iterator[Reader]:
    """Hold open every file that *tensors*, their twins and what is added to them lie in."""
    descriptors: dict[Path, int] = {}
    try:
        for path in sorted(_paths(tensors)):
            descriptors[path] = _open(path)
        yield Reader(descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: was removed since the checkpoint was opened") from error


def check_twins(tensors: Sequence[SourceTensor]) -> None:
    """Compare the ends of each fp32 master with the 16-bit copy that the model trained with.

    They are equal in every sound checkpoint of stages 1 and 2, so a layout that a later
    DeepSpeed changes is found before it becomes a model that loads and is wrong.

    Raises:
        DamagedError: they differ; the message names the parameter.
    """
    twins = [tensor for tensor in tensors if tensor.twin is not None and tensor.num_elements]
    with opened(twins) as reader:
        for tensor in twins:
            count = min(_TWIN_ELEMENTS, tensor.num_elements)
            if not all(_is_twin(reader, tensor, first, count) for first in {0, tensor.num_elements - count}):
                raise DamagedError(
                    f"{tensor.segments[0].path}: the master weights of {tensor.name!r} are not those that "
                    "the model trained with; the file is damaged, or of an unknown version of DeepSpeed"
                )


def _is_twin(reader: Reader, tensor: SourceTensor, first: int, count: int) -> bool:
    assert tensor.twin is not None
    master, twin = reader.read(tensor, first, count), reader.read(tensor.twin, first, count)
    return bool((master.to(twin.dtype).nan_to_num() == twin.nan_to_num()).all())


def _paths(tensors: Iterable[SourceTensor]) -> set[Path]:
    paths = set()
    for tensor in tensors:
        paths |= {segment.path for segment in tensor.segments}
        if tensor.twin is not None:
            paths |= _paths([tensor.twin])
        if tensor.low_rank is not None:
            paths |= _paths([tensor.low_rank.a, tensor.low_rank.b])
    return paths
