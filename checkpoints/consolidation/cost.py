"""The cost of a consolidation, from headers alone.

That is bytes, files, memory and seconds of each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..formats.safetensors_file import Shard
from ..formats.tensors import DTYPES, SourceTensor
from .reader import segments_by_file

# Measured (docs/consolidation.md): Python, numpy and torch's library; two blocks and what a thread keeps; a segment.
_START_BYTES = 110_000_000
_WORKER_BYTES = 8_000_000
_SEGMENT_BYTES = 150


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of all tasks together.

    But *largest_task_bytes*, *memory_bytes* and *seconds* are of the largest one. *seconds* is the time that its bytes
    take at the given speed: a lower bound, which warm files come close to.
    """

    num_files: int
    num_shards: int
    num_tasks: int
    read_bytes: int
    written_bytes: int
    largest_task_bytes: int
    memory_bytes: int
    seconds: float


def estimate_cost(shards: Sequence[Shard], *, num_tasks: int, num_workers: int, bytes_per_second: float) -> Cost:
    """Return the cost of writing *shards* in *num_tasks* tasks.

    Each task moves *bytes_per_second*.
    """
    num_tasks = min(num_tasks, len(shards))
    loads = [
        sum(_num_bytes_read(shard) + shard.num_bytes for shard in shards[task::num_tasks]) for task in range(num_tasks)
    ]
    sources = [tensor.source for shard in shards for tensor in shard.tensors]
    num_segments = sum(len(source.segments) for source in sources)
    return Cost(
        num_files=len(segments_by_file(sources)),
        num_shards=len(shards),
        num_tasks=num_tasks,
        read_bytes=sum(map(_num_bytes_read, shards)),
        written_bytes=sum(shard.num_bytes for shard in shards),
        largest_task_bytes=max(loads),
        memory_bytes=_START_BYTES + num_workers * _WORKER_BYTES + _SEGMENT_BYTES * num_segments,
        seconds=max(loads) / bytes_per_second,
    )


def _num_bytes_read(shard: Shard) -> int:
    return sum(map(_num_bytes_of, (tensor.source for tensor in shard.tensors)))


def _num_bytes_of(tensor: SourceTensor) -> int:
    return tensor.num_elements * DTYPES[tensor.dtype].num_bytes + sum(map(_num_bytes_of, tensor.changes))
