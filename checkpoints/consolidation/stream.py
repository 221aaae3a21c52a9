"""Stream planned shards to disk.

A block is read, cast, written at its place, and hashed. A thread takes a tensor at a time, so that each tensor has one
digest and no thread waits for another. Memory is (workers) x (a block as read and as written), for a model of any size.
No shard knows of the others.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from ..capacity.allocation import allocate, start_writing
from ..formats.safetensors_file import PlacedTensor, Shard
from ..formats.tensors import DTYPES
from .cast import CastReport, cast_block
from .checksums import CrcRecorder, Spans, all_of
from .lora_delta import change_of
from .manifest import ALGORITHM, ALGORITHMS, WeightFile
from .reader import Reader, raise_descriptor_limit, segments_by_file
from .torch_cast import Bytes, one_thread_each

# As read or as written, whichever is larger: it stays in the cache from read to write. 1 MiB blocks took 2.2 s where
# these took 1.9, 16 MiB blocks 3.1.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the streaming.

    *has_statistics* hashes what is written and counts values that become zero; *has_sums* takes the CRCs of what is
    read.
    """

    num_workers: int
    clamp: bool
    has_statistics: bool
    has_sums: bool


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """One file, on disk.

    It has what the cast lost by parameter, and the CRCs of what was read for it.
    """

    file: WeightFile
    losses: Mapping[str, CastReport]
    spans: Spans


def write_shards(
    shards: Sequence[tuple[Shard, Path]],
    settings: Settings,
    *,
    finished: Callable[[Shard, WrittenShard], None],
    progress: Callable[[int, int], None],
) -> None:
    """Write every shard to its path, durably.

    All space is taken before the first byte is read. *finished* is called for each shard that is complete, in the
    thread that wrote its last tensor; *progress* gets (bytes of tensors written, all bytes), in the caller's thread. A
    file that is there is written over: an interrupted consolidation would write the same bytes.
    """
    total = sum(tensor.num_bytes for shard, _ in shards for tensor in shard.tensors)
    with ExitStack() as stack:
        # Held open to the end: another process may rename the file while its last tensors are written here.
        targets = [stack.enter_context(_prepared(path, shard)) for shard, path in shards]
        stack.enter_context(one_thread_each())
        pool = stack.enter_context(ThreadPoolExecutor(settings.num_workers))
        job = _Pass([shard for shard, _ in shards], targets, settings, finished)
        workers = [pool.submit(job.work) for _ in range(settings.num_workers)]
        try:
            for done in job.counts(len(workers)):
                progress(done, total)
        finally:
            job.is_stopped.set()
        for worker in workers:
            worker.result()


@contextmanager
def _prepared(path: Path, shard: Shard) -> Iterator[int]:
    """Make the file of a shard: all its space, and its header."""
    # 0666 less the umask: safetensors 0.8.0 makes files of mode 0600 under every umask (its issue 782).
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        os.ftruncate(descriptor, shard.num_bytes)
        allocate(descriptor, shard.num_bytes)
        _write_all(descriptor, memoryview(shard.header), 0)
        yield descriptor
    finally:
        os.close(descriptor)


class _Pass:
    """The state that the threads of one pass share.

    It has the tensors to do, what came of them, and whether to stop.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        targets: Sequence[int],
        settings: Settings,
        finished: Callable[[Shard, WrittenShard], None],
    ) -> None:
        self.is_stopped = threading.Event()
        self._shards = shards
        self._targets = targets
        self._settings = settings
        self._finished = finished
        self._lock = threading.Lock()
        self._outcomes: list[dict[str, _Outcome]] = [{} for _ in shards]
        self._todo: SimpleQueue[tuple[int, PlacedTensor]] = SimpleQueue()
        self._counts: SimpleQueue[int | None] = SimpleQueue()
        num_files = len(segments_by_file([tensor.source for shard in shards for tensor in shard.tensors]))
        self._max_open = raise_descriptor_limit(num_files, settings.num_workers)
        for number, shard in enumerate(shards):
            # The largest first, so that the threads end together.
            for tensor in sorted(shard.tensors, key=lambda tensor: -tensor.num_bytes):
                self._todo.put((number, tensor))

    def counts(self, num_workers: int) -> Iterator[int]:
        """Yield the bytes written so far, until all workers have left."""
        done = 0
        while num_workers:
            count = self._counts.get()
            if count is None:
                num_workers -= 1
                continue
            done += count
            yield done

    def work(self) -> None:
        """Write tensors until there are none; be one thread."""
        try:
            sums = CrcRecorder() if self._settings.has_sums else None
            with Reader(self._max_open, sums) as reader:
                writer = _Writer(reader, sums, self._settings, self._count)
                while True:
                    number, tensor = self._todo.get_nowait()
                    self._note(number, tensor, writer.write(tensor, self._targets[number]))
        except (Empty, _Stopped):
            pass
        except BaseException:
            self.is_stopped.set()
            raise
        finally:
            self._counts.put(None)

    def _count(self, num_bytes: int) -> None:
        if self.is_stopped.is_set():
            raise _Stopped
        self._counts.put(num_bytes)

    def _note(self, number: int, tensor: PlacedTensor, outcome: _Outcome) -> None:
        shard, outcomes = self._shards[number], self._outcomes[number]
        with self._lock:
            outcomes[tensor.source.name] = outcome
            is_whole = len(outcomes) == len(shard.tensors)
        if is_whole:
            os.fsync(self._targets[number])
            self._finished(shard, _written(shard, outcomes, self._settings.has_statistics))


class _Stopped(Exception):
    """Another thread failed, or the caller was interrupted."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The result of streaming a tensor.

    It has its digest, or the empty text, what the cast lost, and the CRCs of what was read.
    """

    digest: str
    loss: CastReport
    spans: Spans


class _Writer:
    """One thread's buffers, and how it writes a tensor."""

    def __init__(
        self, reader: Reader, sums: CrcRecorder | None, settings: Settings, count: Callable[[int], None]
    ) -> None:
        self._reader = reader
        self._sums = sums
        self._settings = settings
        self._count = count
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def write(self, tensor: PlacedTensor, target: int) -> _Outcome:
        """Write a tensor at its place in *target*."""
        source, digest, loss = tensor.source, ALGORITHMS[ALGORITHM](), CastReport()
        change = change_of(self._reader, source)
        for first, count in _blocks(tensor):
            values, dtype = self._read(tensor, first, count), source.dtype
            if change is not None:
                values, dtype = change.to(values, dtype, first // source.shape[1]), "float32"
            result = self._buffer(1, count * tensor.dtype.num_bytes)
            loss += cast_block(
                *(values, dtype, result, tensor.dtype.name),
                clamp=self._settings.clamp,
                count_flushed=self._settings.has_statistics,
            )
            offset = tensor.offset_bytes + first * tensor.dtype.num_bytes
            _write_all(target, result.data, offset)
            start_writing(target, offset, len(result))
            if self._settings.has_statistics:
                digest.update(result.data)
            self._count(len(result))
        return _Outcome(
            digest=digest.hexdigest() if self._settings.has_statistics else "",
            loss=loss,
            spans=self._sums.take() if self._sums is not None else {},
        )

    def _read(self, tensor: PlacedTensor, first: int, count: int) -> Bytes:
        source = tensor.source
        return self._reader.read(source, first, count, self._buffer(0, count * DTYPES[source.dtype].num_bytes))

    def _buffer(self, number: int, num_bytes: int) -> Bytes:
        if len(self._buffers[number]) < num_bytes:
            self._buffers[number] = np.empty(num_bytes, np.uint8)
        return self._buffers[number][:num_bytes]


def _written(shard: Shard, outcomes: Mapping[str, _Outcome], has_statistics: bool) -> WrittenShard:
    ordered = [(tensor.source.name, outcomes[tensor.source.name]) for tensor in shard.tensors]
    file = WeightFile(
        name=shard.file_name,
        num_bytes=shard.num_bytes,
        header_sha256=hashlib.sha256(shard.header).hexdigest(),
        tensors={name: outcome.digest for name, outcome in ordered} if has_statistics else None,
        algorithm=ALGORITHM,
    )
    return WrittenShard(
        file=file,
        losses={name: outcome.loss for name, outcome in ordered if outcome.loss != CastReport()},
        spans=all_of(outcome.spans for _, outcome in ordered),
    )


def _blocks(tensor: PlacedTensor) -> Iterator[tuple[int, int]]:
    """Yield (first element, count) of pieces that fit into a block."""
    source = tensor.source
    size = _BLOCK_BYTES // max(DTYPES[source.dtype].num_bytes, tensor.dtype.num_bytes)
    if source.changes:  # complete rows, because a row of the change is made at once
        row = source.shape[1]
        size = max(1, size // row) * row
    for first in range(0, source.num_elements, size):
        yield first, min(size, source.num_elements - first)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        num_bytes = os.pwrite(descriptor, view, offset)
        view, offset = view[num_bytes:], offset + num_bytes
