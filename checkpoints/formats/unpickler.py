"""Unpickle a checkpoint's structure with a closed list of globals.

No code of the file is called. Tensors become `StoredTensor`, a place in the file; objects of unknown classes become
empty stand-ins; a call of anything unknown is refused.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, Protocol

from ...errors import DamagedError, UsageError
from ...remote import Place
from .tensors import DTYPES, Segment

_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}
# Python 3.11.0 to 3.11.3 pickle a member of an Enum as getattr(class, name), others as class(value).
_ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}
# Called while loading by what people put into checkpoints, and harmless: each call yields an inert object.
_INERT = frozenset(
    f"{module}.{name}"
    for modules, names in (
        ("builtins __builtin__", "set frozenset bytearray complex slice range"),
        ("collections", "defaultdict deque Counter"),
        ("copyreg copy_reg", "_reconstructor"),
        ("_codecs", "encode"),
        ("datetime", "datetime date time timedelta timezone"),
        ("pathlib pathlib._local", "Path PosixPath PurePosixPath WindowsPath PureWindowsPath"),
        ("numpy", "dtype ndarray"),
        ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct scalar"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
    )
    for module in modules.split()
    for name in names.split()
)


class Records(Protocol):
    """The storages of one file: what an `Archive` is to the tensors in it."""

    path: Place

    def size_of(self, key: str) -> int:
        """Return the size of a storage in bytes."""

    def offset_of(self, key: str) -> int:
        """Return where a storage begins in the file; this looks into the file."""

    def crc_of(self, key: str) -> int:
        """Return the CRC-32 of a storage's bytes."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that lies in a file, unread: *first_byte* of the storage *key*."""

    records: Records
    key: str
    first_byte: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def path(self) -> Place:
        return self.records.path

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after another, as row-major order wants."""
        return _is_contiguous(self.shape, self.stride)

    @property
    def crc32(self) -> int:
        """The checksum of its whole storage, known without reading it."""
        return self.records.crc_of(self.key)

    def segment(self, first: int, count: int) -> Segment:
        """Return *count* elements from *first* on.

        Raise `DamagedError` where there are fewer.
        """
        if not self.is_contiguous:
            raise UsageError(
                f"{self.path}: a tensor of shape {self.shape} is saved as a strided view; save it contiguous"
            )
        if first + count > self.num_elements:
            raise DamagedError(f"{self.path}: a tensor has {self.num_elements} elements, {first + count} are needed")
        element_bytes = DTYPES[self.dtype].num_bytes if self.dtype in DTYPES else 1
        begin = self.records.offset_of(self.key) + self.first_byte
        return Segment(path=self.path, offset_bytes=begin + first * element_bytes, num_elements=count)


@dataclass(frozen=True, kw_only=True)
class _Storage:
    key: str
    num_bytes: int
    dtype: str


class RefusedGlobal(Exception):
    """The pickle calls something that is not on the list; the argument is its name."""


class _Foreign(dict[Any, Any]):
    """Stands for an object of a class that is not ours to import.

    It keeps nothing and runs nothing. Objects are made by `__new__` alone. `__init__` runs only when the pickle calls
    the global as a function: that is how a hostile pickle runs code, so it is refused.
    """

    global_name = ""

    def __new__(cls, *_: object, **__: object) -> _Foreign:
        return dict.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        raise RefusedGlobal(self.global_name)

    def __setstate__(self, _: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...

    __hash__ = object.__hash__  # type: ignore[assignment]  # any object may be a key of a dict


def is_foreign(value: object) -> bool:
    """Say whether *value* stands for an object of a class, and lacks what that holds."""
    return isinstance(value, _Foreign)


class Unpickler(pickle.Unpickler):
    """Resolves globals from the list below; calling any other raises `RefusedGlobal`.

    *known* are further globals and what stands for them; it must be harmless to call.
    """

    def __init__(self, stream: IO[bytes], records: Records | None, known: Mapping[str, object] | None = None) -> None:
        super().__init__(stream)
        self._records = records
        self._makers = (self._tensor, self._sized_tensor, self._wrapped)
        # Bound methods, because a pickle can set attributes of all that it can name, and not of these.
        self._known: dict[str, object] = {
            "collections.OrderedDict": OrderedDict,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._sized_tensor,
            "torch._utils._rebuild_parameter": self._wrapped,
            "torch._utils._rebuild_parameter_with_state": self._wrapped,
            "torch._tensor._rebuild_from_type_v2": self._typed_tensor,
            "deepspeed.runtime.zero.config.ZeroStageEnum": int,
            "builtins.getattr": self._stage,
            "__builtin__.getattr": self._stage,
            **(known or {}),
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if module == "torch" and name in DTYPES:
            return name
        if full in _INERT:
            return self._inert
        return type(name, (_Foreign,), {"global_name": full})

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, num_elements = pid
        if kind != "storage":
            raise ValueError(f"unknown persistent id {kind!r}")
        dtype = self.dtype_of(storage_type)
        if self._records is None:
            raise ValueError("it holds a tensor where there can be none")
        num_bytes = self._records.size_of(str(key))
        if dtype in DTYPES and num_bytes < num_elements * DTYPES[dtype].num_bytes:
            raise ValueError(f"storage {key} has {num_bytes} bytes for {num_elements} elements of {dtype}")
        return _Storage(key=str(key), num_bytes=num_bytes, dtype=dtype)

    @staticmethod
    def dtype_of(storage_type: Any) -> str:
        """Return the element type of a storage by the global that names it."""
        global_name: str = storage_type.global_name
        return _STORAGES.get(global_name.rpartition(".")[2], global_name)

    def _tensor(
        self, storage: _Storage, first: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> StoredTensor:
        return self._sized_tensor(storage, first, shape, stride, False, None, storage.dtype)

    def _sized_tensor(
        self, storage: _Storage, first: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: object
    ) -> StoredTensor:
        dtype = rest[2] if isinstance(rest[2], str) else getattr(rest[2], "global_name", "unknown")
        element_bytes = DTYPES[dtype].num_bytes if dtype in DTYPES else 1
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else 0
        if min((first, *shape, *stride), default=0) < 0 or (first + span) * element_bytes > storage.num_bytes:
            raise ValueError(f"a tensor of shape {tuple(shape)} reaches past its storage")
        assert self._records is not None  # a storage was made of it
        return StoredTensor(
            records=self._records,
            key=storage.key,
            first_byte=first * element_bytes,
            dtype=dtype,
            shape=tuple(shape),
            stride=tuple(stride),
        )

    def _wrapped(self, tensor: StoredTensor, *_: object) -> StoredTensor:
        return tensor

    def _typed_tensor(self, maker: Any, _: object, arguments: tuple[Any, ...], *__: object) -> StoredTensor:
        if maker not in self._makers:
            raise RefusedGlobal(getattr(maker, "global_name", repr(maker)))
        made: StoredTensor = maker(*arguments)
        return made

    def _stage(self, owner: object, name: object) -> int:
        if owner is not int or not isinstance(name, str) or name not in _ZERO_STAGES:
            raise RefusedGlobal("builtins.getattr")
        return _ZERO_STAGES[name]

    def _inert(self, *_: object, **__: object) -> _Foreign:
        return _Foreign.__new__(_Foreign)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    if not all(shape):
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
