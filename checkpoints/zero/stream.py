"""Stream planned shards to disk: read a block, cast it, write it at its place, hash it in order.

Memory is (workers) x (a block as read) + (workers + 1) x (a block as written), whatever the
size of the model. No shard knows of the others: each could be streamed by another process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from .cast import Loss
from .manifest import FileRecord
from .reader import Reader, opened
from .room import reserve
from .source import DTYPES, LowRank, SourceTensor
from .tensorfile import PlacedTensor, Shard

if TYPE_CHECKING:
    import torch

# 1 Mi elements stay in the cache from read to write: 256 Ki took 2.2 s, 4 Mi 3.1 s, this 1.9 s.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Elements of one tensor, and the open file that they go to."""

    tensor: PlacedTensor
    first: int
    num_elements: int
    descriptor: int

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.tensor.dtype.num_bytes


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a pass over all shards left: its files, and what the cast lost by parameter."""

    files: tuple[FileRecord, ...]
    losses: Mapping[str, Loss]


def write_shards(
    shards: Sequence[Shard],
    folder: Path,
    *,
    num_workers: int,
    cast: Callable[[torch.Tensor, torch.Tensor], Loss],
    progress: Callable[[int, int], None],
) -> Written:
    """Write every shard into *folder*, durably; all room is taken before the first byte is read.

    *progress* gets (bytes of tensors written, all bytes) after each block.
    """
    tally = _Tally(sum(tensor.num_bytes for shard in shards for tensor in shard.tensors), progress)
    with ExitStack() as stack:
        targets = [stack.enter_context(_created(folder / shard.file_name)) for shard in shards]
        for shard, target in zip(shards, targets, strict=True):
            reserve(target, shard.num_bytes)
        sources = [tensor.source for shard in shards for tensor in shard.tensors]
        reader = stack.enter_context(opened(sources))
        stack.enter_context(_one_thread_each())
        pool = stack.enter_context(ThreadPoolExecutor(num_workers))
        writer = _Writer(pool, reader, num_workers, cast)
        files = tuple(_write_shard(shard, target, writer, tally) for shard, target in zip(shards, targets, strict=True))
    return Written(files=files, losses=tally.losses)


class _Tally:
    """Counts over all shards of a pass."""

    def __init__(self, num_bytes: int, progress: Callable[[int, int], None]) -> None:
        self.losses: dict[str, Loss] = {}
        self._num_bytes = num_bytes
        self._done = 0
        self._progress = progress

    def add(self, block: _Block, loss: Loss) -> None:
        if loss != Loss():
            name = block.tensor.source.name
            self.losses[name] = self.losses.get(name, Loss()) + loss
        self._done += block.num_bytes
        self._progress(self._done, self._num_bytes)


def _write_shard(shard: Shard, target: int, writer: _Writer, tally: _Tally) -> FileRecord:
    digest = hashlib.sha256(shard.header)
    _write_all(target, memoryview(shard.header), 0)
    for block, written, loss in writer.write_in_order(_blocks(shard, target)):
        digest.update(written)
        tally.add(block, loss)
    os.fsync(target)
    return FileRecord(name=shard.file_name, num_bytes=shard.num_bytes, sha256=digest.hexdigest())


class _Writer:
    """The threads of one pass and what they share: open files, buffers to write from, factors of adapters."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        reader: Reader,
        num_workers: int,
        cast: Callable[[torch.Tensor, torch.Tensor], Loss],
    ) -> None:
        self._pool = pool
        self._reader = reader
        self._cast = cast
        self._window = num_workers + 1
        # As many as blocks can be under way, so that no thread ever waits for one.
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(self._window):
            self._free.put(bytearray())
        self._own = threading.local()
        self._factors = functools.lru_cache(maxsize=self._window)(self._read_factors)

    def write_in_order(self, blocks: Iterator[_Block]) -> Iterator[tuple[_Block, memoryview, Loss]]:
        """Yield each written block and its bytes, in order; the bytes are valid until the next."""
        under_way: deque[tuple[_Block, Future[tuple[bytearray, Loss]]]] = deque()
        for block in blocks:
            under_way.append((block, self._pool.submit(self._write, block)))
            if len(under_way) == self._window:
                yield from self._finish(*under_way.popleft())
        for block, future in under_way:
            yield from self._finish(block, future)

    def _finish(
        self, block: _Block, future: Future[tuple[bytearray, Loss]]
    ) -> Iterator[tuple[_Block, memoryview, Loss]]:
        buffer, loss = future.result()
        yield block, memoryview(buffer)[: block.num_bytes], loss
        self._free.put(buffer)

    def _write(self, block: _Block) -> tuple[bytearray, Loss]:
        import torch

        source = block.tensor.source
        values = self._read(source, block.first, block.num_elements)
        if source.low_rank is not None:
            values = self._added(values, source.low_rank, block.first // source.shape[1])
        buffer = _at_least(self._free.get(), block.num_bytes)
        dtype: torch.dtype = getattr(torch, block.tensor.dtype.name)
        loss = self._cast(values, torch.frombuffer(buffer, dtype=dtype, count=block.num_elements))
        offset = block.tensor.offset_bytes + block.first * block.tensor.dtype.num_bytes
        _write_all(block.descriptor, memoryview(buffer)[: block.num_bytes], offset)
        return buffer, loss

    def _read(self, tensor: SourceTensor, first: int, count: int) -> torch.Tensor:
        """Read elements into this thread's own buffer: valid until its next read."""
        num_bytes = count * DTYPES[tensor.dtype].num_bytes
        self._own.buffer = _at_least(getattr(self._own, "buffer", bytearray()), num_bytes)
        return self._reader.read(tensor, first, count, buffer=self._own.buffer)

    def _added(self, values: torch.Tensor, low_rank: LowRank, first_row: int) -> torch.Tensor:
        a, b = self._factors(low_rank)
        left, right = (a.T, b.T) if low_rank.is_transposed else (b, a)
        num_rows = values.numel() // right.shape[1]
        change = (left[first_row : first_row + num_rows] @ right).mul_(low_rank.scaling)
        return change.flatten().add_(values)

    def _read_factors(self, low_rank: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (self._reader.read(factor, 0, factor.num_elements) for factor in (low_rank.a, low_rank.b))
        return a.float().view(low_rank.a.shape), b.float().view(low_rank.b.shape)


def _blocks(shard: Shard, descriptor: int) -> Iterator[_Block]:
    for tensor in shard.tensors:
        size = _BLOCK_ELEMENTS
        if tensor.source.low_rank is not None:  # whole rows, for a row of the change is made at once
            row = tensor.source.shape[1]
            size = max(1, size // row) * row
        for first in range(0, tensor.source.num_elements, size):
            count = min(size, tensor.source.num_elements - first)
            yield _Block(tensor=tensor, first=first, num_elements=count, descriptor=descriptor)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        num_bytes = os.pwrite(descriptor, view, offset)
        view, offset = view[num_bytes:], offset + num_bytes


def _at_least(buffer: bytearray, num_bytes: int) -> bytearray:
    return buffer if len(buffer) >= num_bytes else bytearray(num_bytes)


@contextmanager
def _created(path: Path) -> Iterator[int]:
    # 0666 less the umask: safetensors 0.8.0 makes files of mode 0600, whatever the umask (its issue 782).
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from starting a pool of threads within each of ours."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
