"""The safetensors container, read and planned without torch.

It is byte for byte as safetensors 0.8.0 writes it. A file is planned whole before its first byte is written: header,
and every tensor's place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DamagedError, UsageError
from ...remote import Place, open_ranges, read_size
from .tensors import DTYPES, DTYPES_BY_TAG, RANKS, Dtype, Segment, SourceTensor, dtype_of

INDEX_NAME = "model.safetensors.index.json"
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself


@dataclass(frozen=True, kw_only=True)
class PlacedTensor:
    """A tensor, the dtype that it gets, and where its bytes begin in its file."""

    source: SourceTensor
    dtype: Dtype
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.source.num_elements * self.dtype.num_bytes


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file: its header, then its tensors without holes, in order."""

    file_name: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


def read_tensors(path: Place, begin: int = 0) -> list[SourceTensor]:
    """Return the tensors of a safetensors file in the order of their bytes.

    It raises what `read_file` raises.
    """
    return read_file(path, begin)[0]


def read_file(path: Place, begin: int = 0) -> tuple[list[SourceTensor], Mapping[str, str]]:
    """Return the tensors of a safetensors file, and its metadata.

    The file starts at *begin*; the tensors are in the order of their bytes.

    Raises:
        DamagedError: the header is not one, or the file is shorter than it says.
        UsageError: a dtype that cannot be converted.
    """
    size = read_size(path)
    header, data_offset = read_header(path, begin)
    try:
        tensors = [_read_entry(path, data_offset, name, entry) for name, entry in header.items() if name != _METADATA]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: its safetensors header cannot be read ({error})") from error
    ends = [
        segment.offset_bytes + segment.num_elements * DTYPES[tensor.dtype].num_bytes
        for tensor in tensors
        for segment in tensor.segments
    ]
    if max(ends, default=0) > size:
        raise DamagedError(f"{path}: cut off: it has {size} bytes, its header describes {max(ends)}")
    return sorted(tensors, key=lambda tensor: tensor.segments[0].offset_bytes), header.get(_METADATA) or {}


def read_header(path: Place, begin: int = 0) -> tuple[Mapping[str, Mapping[str, Any]], int]:
    """Return what the header of a safetensors file says by name.

    Return also where the tensors' bytes begin.

    Raises:
        DamagedError: there is no such header.
    """
    size = read_size(path)
    with open_ranges(path) as stream:
        stream.seek(begin)
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > min(size, _MAX_HEADER_BYTES):
            raise DamagedError(f"{path}: cut off, or not a safetensors file")
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f"it is {type(header).__name__}, not a mapping")
    except ValueError as error:
        raise DamagedError(f"{path}: its safetensors header cannot be read ({error})") from error
    return header, begin + 8 + header_bytes


def _read_entry(path: Place, data_offset: int, name: str, entry: Mapping[str, object]) -> SourceTensor:
    tag, shape, (begin, end) = entry["dtype"], entry["shape"], _pair(entry["data_offsets"])
    dtype = DTYPES_BY_TAG.get(str(tag))
    if dtype is None:
        raise UsageError(f"{path}: tensor {name!r} has dtype {tag}; known: {', '.join(DTYPES_BY_TAG)}")
    sizes = tuple(map(int, shape)) if isinstance(shape, list) else ()
    num_elements = math.prod(sizes)
    if begin < 0 or end - begin != num_elements * dtype.num_bytes:
        raise ValueError(f"tensor {name!r} of shape {shape} takes {end - begin} bytes")
    segment = Segment(path=path, offset_bytes=data_offset + begin, num_elements=num_elements)
    return SourceTensor(name=name, shape=sizes, dtype=dtype.name, segments=(segment,))


def _pair(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"data_offsets is {value!r}")
    return int(value[0]), int(value[1])


def plan_shards(
    tensors: Sequence[SourceTensor], *, dtype: str | None, max_shard_bytes: int | None, stem: str = "model"
) -> tuple[Shard, ...]:
    """Cut *tensors*, in their order, into files.

    A file has at most *max_shard_bytes* of data; None: one file. A larger tensor gets a file of its own. Floats get
    *dtype*; all else keeps its own, and with None floats do too.
    """
    float_dtype = None if dtype is None else DTYPES[dtype]
    groups = _grouped(tensors, float_dtype, max_shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return tuple(_plan_shard(name, group, float_dtype) for name, group in zip(names, groups, strict=True))


def index_text(shards: Sequence[Shard]) -> str:
    """Return the index that says which file holds which tensor.

    It is as huggingface_hub writes it.
    """
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.source.name: shard.file_name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _grouped(
    tensors: Sequence[SourceTensor], dtype: Dtype | None, max_shard_bytes: int | None
) -> list[list[SourceTensor]]:
    """Group as huggingface_hub does.

    A tensor above the limit closes no group, its file just comes first.
    """
    groups: list[list[SourceTensor]] = []
    current: list[SourceTensor] = []
    filled = 0
    for tensor in tensors:
        num_bytes = tensor.num_elements * _target(tensor, dtype).num_bytes
        if max_shard_bytes is not None and num_bytes > max_shard_bytes:
            groups.append([tensor])
            continue
        if max_shard_bytes is not None and filled + num_bytes > max_shard_bytes:
            groups.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += num_bytes
    return groups + [current] if current or not groups else groups


def _plan_shard(file_name: str, tensors: Sequence[SourceTensor], dtype: Dtype | None) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: (RANKS[_target(tensor, dtype).name], tensor.name))
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}
    offsets = [0]
    for tensor in ordered:
        target = _target(tensor, dtype)
        offsets.append(offsets[-1] + tensor.num_elements * target.num_bytes)
        entries[tensor.name] = {
            "dtype": target.tag,
            "shape": list(tensor.shape),
            "data_offsets": offsets[-2:],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed = (
        PlacedTensor(source=tensor, dtype=_target(tensor, dtype), offset_bytes=len(header) + offset)
        for tensor, offset in zip(ordered, offsets, strict=False)
    )
    return Shard(file_name=file_name, header=header, tensors=tuple(placed))


def _target(tensor: SourceTensor, dtype: Dtype | None) -> Dtype:
    own = dtype_of(tensor)
    return dtype if dtype is not None and own.is_float else own
