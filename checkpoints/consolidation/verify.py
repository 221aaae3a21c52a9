"""Check a consolidation by another path than the one that made it.

The source: all of the 16-bit copies that stages 1 and 2 keep, of which consolidation itself looks at the ends. The
result: read back, and compared with the source cast by numpy's arithmetic, where torch's kernels made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import DamagedError
from ...remote import Place, read_size
from ..formats.safetensors_file import PlacedTensor, Shard, read_tensors
from ..formats.tensors import DTYPES, SourceTensor
from .cast import bits_of
from .reader import Reader, check_working_copy
from .torch_cast import Bytes

_BLOCK_BYTES = 4 << 20
# The step between neighbouring numbers, relative to them.
_STEPS: Mapping[str, float] = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}
# The step between the numbers next to 0, where they are not relative; the others' are too small to matter.
_LEAST_STEP = {"float16": 2.0**-24}
_T = TypeVar("_T")
_Numbers = NDArray[np.float64]


def verify_shards(shards: Sequence[Shard], places: Sequence[Place], *, num_workers: int, clamp: bool) -> None:
    """Check written *shards* against the checkpoint that they were made of.

    They lie at *places*.

    Raises:
        DamagedError: a record of the source, or a tensor of the result, is not what it should be; it is named.
    """
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    sources = [tensor.source for tensor in tensors]
    for shard, place in zip(shards, places, strict=True):
        _check_header(shard, place)
    _each(_check_all_working_copies, [source for source in sources if source.working_copy is not None], num_workers)
    located = [(tensor, place) for shard, place in zip(shards, places, strict=True) for tensor in shard.tensors]
    _each(lambda each: _check_tensor(*each, clamp=clamp), located, num_workers)


def _each(check: Callable[[_T], None], items: Iterable[_T], num_workers: int) -> None:
    with ThreadPoolExecutor(num_workers) as pool:
        for _ in pool.map(check, items):
            pass


def _check_all_working_copies(tensor: SourceTensor) -> None:
    with Reader() as reader:
        for first, count in _pieces(tensor):
            check_working_copy(reader, tensor, first, count)


def _check_header(shard: Shard, place: Place) -> None:
    """Compare the file's header, read back, with the plan."""
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in read_tensors(place)}
    planned = {tensor.source.name: (tensor.dtype.name, tensor.source.shape) for tensor in shard.tensors}
    if found != planned or read_size(place) != shard.num_bytes:
        raise DamagedError(f"{place}: its header is not the one that was written; consolidate again")


def _check_tensor(tensor: PlacedTensor, place: Place, *, clamp: bool) -> None:
    source = tensor.source
    written = next(found for found in read_tensors(place) if found.name == source.name)
    changed = _changed(source) if source.changes else None
    with Reader() as reader, Reader() as back:
        for first, count in _pieces(source):
            values = reader.read(source, first, count)
            result = back.read(written, first, count)
            if changed is not None:
                numbers = _numbers(values, source.dtype).astype(np.float64).reshape(-1, source.shape[1])
                expected_rows = changed(numbers, first // source.shape[1]).ravel()
                is_same = _is_near(_numbers(result, written.dtype), expected_rows, written.dtype)
            else:
                expected = _cast(values, source.dtype, written.dtype, clamp)
                is_same = bool(np.array_equal(expected, result))
            if not is_same:
                raise DamagedError(
                    f"{place}: {source.name!r} is not the checkpoint's, between the elements {first} and "
                    f"{first + count}; the disk or the memory is at fault, consolidate again"
                )


def _pieces(tensor: SourceTensor) -> Iterable[tuple[int, int]]:
    size = _BLOCK_BYTES // DTYPES[tensor.dtype].num_bytes
    if tensor.changes:
        size = max(1, size // tensor.shape[1]) * tensor.shape[1]
    return ((first, min(size, tensor.num_elements - first)) for first in range(0, tensor.num_elements, size))


def _numbers(values: Bytes, dtype: str) -> NDArray[Any]:
    """Return floats as numpy's, bfloat16 as float32."""
    if dtype == "bfloat16":
        return (bits_of(values, dtype).astype(np.uint32) << 16).view(np.float32)
    return values.view(np.dtype(dtype))


def _cast(values: Bytes, source_dtype: str, dtype: str, clamp: bool) -> Bytes:
    if source_dtype == dtype:
        return values
    numbers = _numbers(values, source_dtype)
    with np.errstate(over="ignore"):
        single = numbers.astype(np.float32)  # as torch does, also from doubles
        if dtype == "bfloat16":
            bits = single.view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
            largest = rounded & 0x8000 | 0x7F7F
            rounded = np.where((rounded & 0x7F80 == 0x7F80) & clamp, largest, rounded)
            return rounded.astype(np.uint16).view(np.uint8)
        if clamp:
            limit = np.finfo(dtype).max
            single = np.clip(single, -limit, limit)
        return single.astype(np.dtype(dtype)).view(np.uint8)


def _changed(source: SourceTensor) -> Callable[[_Numbers, int], _Numbers]:
    """Return what gives rows of the weight, from one on, as its adapter changes them."""
    low_rank, rows = source.low_rank, source.rows
    if rows is not None:
        values, numbers = _whole(rows.values), np.asarray(rows.numbers)

        def replaced(weights: _Numbers, first: int) -> _Numbers:
            within = (numbers >= first) & (numbers < first + len(weights))
            weights[numbers[within] - first] = values[within]
            return weights

        return replaced
    assert low_rank is not None
    product = low_rank.scaling * (_whole(low_rank.b) @ _whole(low_rank.a))
    change = product.T if low_rank.is_transposed else product
    magnitude = _whole(low_rank.magnitude).reshape(-1, 1) if low_rank.magnitude is not None else None

    def added(weights: _Numbers, first: int) -> _Numbers:
        total = weights + change[first : first + len(weights)]
        if magnitude is not None:
            total *= magnitude[first : first + len(weights)] / np.linalg.norm(total, axis=1, keepdims=True)
        return np.asarray(total)

    return added


def _whole(part: SourceTensor) -> _Numbers:
    with Reader() as reader:
        values = reader.read(part, 0, part.num_elements)
    return np.asarray(_numbers(values, part.dtype).astype(np.float64).reshape(part.shape))


def _is_near(found: NDArray[Any], expected: NDArray[np.float64], dtype: str) -> bool:
    largest = float(np.abs(expected).max(initial=0.0))
    least = max(1e-6 * largest, _LEAST_STEP.get(dtype, 0.0))
    return bool(np.allclose(found.astype(np.float64), expected, rtol=_STEPS[dtype], atol=least))
