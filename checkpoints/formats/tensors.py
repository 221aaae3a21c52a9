"""The content of a checkpoint: named tensors, each a list of pieces of files.

This is data only, nothing is read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from ...errors import DamagedError, UsageError

if TYPE_CHECKING:
    from ...remote import Place

FloatDtype = Literal["float16", "bfloat16", "float32"]  # what is trained and written here
Role = Literal["buffer", "frozen", "trained", "unknown"]
Content = Literal["model", "adapter"]


@dataclass(frozen=True, kw_only=True)
class Dtype:
    """One element type: torch's name, safetensors' tag, size in bytes."""

    name: str
    tag: str
    num_bytes: int
    is_float: bool


def _dtype(name: str, tag: str, num_bytes: int, is_float: bool = False) -> Dtype:
    return Dtype(name=name, tag=tag, num_bytes=num_bytes, is_float=is_float)


# The one table of element types, in the order in which safetensors 0.8.0 lays them out in a file: the tests compare
# files byte for byte.
_ALL = (
    _dtype("uint64", "U64", 8),
    _dtype("int64", "I64", 8),
    _dtype("float64", "F64", 8, is_float=True),
    _dtype("complex64", "C64", 8),
    _dtype("float32", "F32", 4, is_float=True),
    _dtype("uint32", "U32", 4),
    _dtype("int32", "I32", 4),
    _dtype("bfloat16", "BF16", 2, is_float=True),
    _dtype("float16", "F16", 2, is_float=True),
    _dtype("uint16", "U16", 2),
    _dtype("int16", "I16", 2),
    _dtype("int8", "I8", 1),
    _dtype("uint8", "U8", 1),
    _dtype("bool", "BOOL", 1),
)
DTYPES: Mapping[str, Dtype] = MappingProxyType({dtype.name: dtype for dtype in _ALL})
RANKS: Mapping[str, int] = MappingProxyType({dtype.name: rank for rank, dtype in enumerate(_ALL)})
DTYPES_BY_TAG: Mapping[str, Dtype] = MappingProxyType({dtype.tag: dtype for dtype in _ALL})


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of elements that lie side by side in one file.

    There is one for each tensor and rank: half a million.
    """

    path: Place
    offset_bytes: int
    num_elements: int


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The change that a LoRA adapter adds to a weight: ``scaling * (b @ a)``.

    It is transposed for a weight of (in, out). With a *magnitude* (DoRA) each row of the sum gets that length.
    """

    a: SourceTensor
    b: SourceTensor
    scaling: float
    is_transposed: bool
    magnitude: SourceTensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a weight that an adapter puts in the place of its own."""

    numbers: tuple[int, ...]
    values: SourceTensor


@dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor of the model.

    Its segments, one after another, are its elements in row-major order. *working_copy* is the 16-bit copy that the
    model trained with, where the checkpoint holds one beside the fp32 master; *low_rank* is added to the elements, and
    *rows* replaced, before they are cast.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    segments: tuple[Segment, ...]
    role: Role = "unknown"
    working_copy: SourceTensor | None = None
    low_rank: LowRank | None = None
    rows: Rows | None = None

    @property
    def changes(self) -> tuple[SourceTensor, ...]:
        """What is read besides the elements, to change them by whole rows."""
        factors = (self.low_rank.a, self.low_rank.b, self.low_rank.magnitude) if self.low_rank else ()
        return tuple(part for part in (*factors, self.rows.values if self.rows else None) if part is not None)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint, opened: tensors in state-dict order.

    *aliases* are (name that is not stored, name that holds its data): tied weights.
    *adapter_config* is peft's, where the checkpoint is an adapter and its folder has one; *base* is what it
    was trained on, where the checkpoint holds that too. *digest* changes when
    any weight does, as far as the files' own directories, sizes and dates show.
    """

    path: Place
    content: Content
    tensors: tuple[SourceTensor, ...]
    tag: str = ""
    step: int | None = None
    zero_stage: int | None = None
    world_size: int = 1
    ds_version: str = ""
    digest: str = ""
    kind: str = "Hugging Face model"
    aliases: tuple[tuple[str, str], ...] = ()
    adapter_config: Mapping[str, object] | None = field(default=None, repr=False)
    base: Source | None = field(default=None, repr=False)


def dtype_of(tensor: SourceTensor) -> Dtype:
    """Return a tensor's element type.

    Raise `UsageError` for one that cannot be cast or kept.
    """
    found = DTYPES.get(tensor.dtype)
    if found is None:
        raise UsageError(
            f"tensor {tensor.name!r} has dtype {tensor.dtype}; known: {', '.join(DTYPES)} "
            "(consolidate the checkpoint from before quantisation)"
        )
    return found


def cut(segments: Sequence[Segment], element_bytes: int, first: int, count: int) -> Iterator[Segment]:
    """Yield the pieces of *segments* that hold the elements first .. first + count.

    Raises:
        DamagedError: the segments end before that.
    """
    for segment in segments:
        if count == 0:
            return
        if first >= segment.num_elements:
            first -= segment.num_elements
            continue
        taken = min(count, segment.num_elements - first)
        yield Segment(
            path=segment.path,
            offset_bytes=segment.offset_bytes + first * element_bytes,
            num_elements=taken,
        )
        first, count = 0, count - taken
    if count:
        last = segments[-1].path if segments else "an empty list of files"
        raise DamagedError(f"{last}: holds {count} elements fewer than its parameters need")
