"""Read a `torch.save` file with the standard library.

It finds where the tensors lie, and runs nothing. The file is a zip whose records are stored, not compressed: one
pickle, and one record per storage.
"""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from ...errors import DamagedError, NotFoundError, UsageError
from ...remote import Place, Positioned, open_ranges
from .unpickler import RefusedGlobal, StoredTensor, Unpickler

# What zipfile and pickle raise for bytes that are not theirs; a pickle may also ask for any amount of memory.
_MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One storage of a file.

    It has where its bytes begin in the file, how many, and the CRC-32 that the zip directory has of them.
    """

    offset_bytes: int
    num_bytes: int
    crc32: int


class Archive:
    """The zip container: where each storage's bytes begin.

    It may be a part of the file, from *base_offset* on, as in torch's distributed checkpoints.
    """

    def __init__(self, path: Place, stream: IO[bytes], *, base_offset: int = 0) -> None:
        self.path = path
        self._stream = stream
        self._base = base_offset
        self._zip = zipfile.ZipFile(stream)
        pickles = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records named data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        self._offsets: dict[str, int] = {}

    def read(self, name: str) -> bytes:
        """Return a record's bytes.

        Their CRC is checked where torch has taken it (`set_crc32_options`).
        """
        info = self._zip.getinfo(self._root + name)
        if info.CRC:
            return self._zip.read(info)
        offset = self._find(name)
        with self._reopened() as stream:
            stream.seek(offset)
            return stream.read(info.file_size)

    def has(self, name: str) -> bool:
        return self._root + name in self._zip.NameToInfo

    @property
    def saved_as(self) -> str:
        """Return the file's name without its ending when it was written.

        It is "archive" when torch did not get a name.
        """
        return self._root.rstrip("/")

    def crc_of(self, key: str) -> int:
        """Return the CRC-32 of a storage, as the zip directory has it."""
        return self._zip.getinfo(f"{self._root}data/{key}").CRC

    def digest(self) -> str:
        """Return what changes when any record does.

        It is the sha256 of all names, sizes and CRCs.
        """
        lines = (f"{info.filename} {info.file_size} {info.CRC}\n" for info in self._zip.infolist())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def size_of(self, key: str) -> int:
        return self._zip.getinfo(f"{self._root}data/{key}").file_size

    def offset_of(self, key: str) -> int:
        if key not in self._offsets:
            with naming(self.path):
                self._offsets[key] = self._base + self._find(f"data/{key}")
        return self._offsets[key]

    def records(self) -> list[Record]:
        """Return all storages, in the order of the file."""
        prefix = f"{self._root}data/"
        found = [info for info in self._zip.infolist() if info.filename.startswith(prefix)]
        keys = [info.filename.removeprefix(prefix) for info in sorted(found, key=lambda info: info.header_offset)]
        return [
            Record(offset_bytes=self.offset_of(key), num_bytes=self.size_of(key), crc32=self.crc_of(key))
            for key in keys
        ]

    def _find(self, name: str) -> int:
        info = self._zip.getinfo(self._root + name)
        with self._reopened() as stream:
            stream.seek(info.header_offset)
            header = stream.read(30)
        if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is not stored plainly")
        # The local header's own lengths count: its extra field holds the alignment that torch adds.
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return info.header_offset + 30 + skip

    @contextmanager
    def _reopened(self) -> Iterator[IO[bytes]]:
        # The files of all ranks are not held open: there may be thousands.
        if not self._stream.closed:
            yield self._stream
            return
        with _opened(self.path) as stream:
            yield stream


class Slice(Positioned):
    """A part of a seekable stream, as a stream of its own."""

    def __init__(self, stream: IO[bytes], begin: int, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._stream = stream
        self._begin = begin
        end = stream.seek(0, io.SEEK_END)
        if begin < 0 or begin + num_bytes > end:
            raise EOFError(f"it has {end} bytes, {begin + num_bytes} are needed")

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._size - self._position)
        self._stream.seek(self._begin + self._position)
        found = self._stream.read(left if size < 0 else min(size, left))
        self._position += len(found)
        return found


def open_archive(path: Place) -> Archive:
    """Open the zip directory of a `torch.save` file; the file is closed again.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it was saved by torch's old serialization, which cannot be read in place.
        DamagedError: it is cut off.
    """
    with _opened(path) as stream, naming(path):
        _refuse_old_format(path, stream)
        return Archive(path, stream)


def load_state(path: Place) -> tuple[Mapping[str, object], Archive]:
    """Return the mapping that *path* holds, and the file's directory.

    The tensors are left in the file.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it was saved by torch's old serialization, which cannot be read in place.
        DamagedError: it is cut off or not what the format says, or it calls a global that is
            not on the list: that one is named, and was not called.
    """
    state, archive = load_any(path)
    if not isinstance(state, dict):
        raise DamagedError(f"{path}: holds {type(state).__name__}, not the mapping of a checkpoint")
    return state, archive


def load_any(path: Place) -> tuple[object, Archive]:
    """Return the object that *path* holds, of any type, else as `load_state`."""
    with _opened(path) as stream, naming(path):
        _refuse_old_format(path, stream)
        archive = Archive(path, stream)
        return unpickled(archive), archive


def load_tensor(path: Place, stream: IO[bytes], begin: int, num_bytes: int) -> StoredTensor:
    """Return the one tensor that a part of an open file holds.

    torch's distributed checkpoints have such parts.
    """
    with naming(path):
        archive = Archive(path, cast(IO[bytes], Slice(stream, begin, num_bytes)), base_offset=begin)
        tensor = unpickled(archive)
        if isinstance(tensor, StoredTensor):
            archive.offset_of(tensor.key)  # while the stream is open
    if not isinstance(tensor, StoredTensor):
        raise DamagedError(f"{path}: holds {type(tensor).__name__} at byte {begin}, not a tensor")
    return tensor


def unpickled(archive: Archive) -> object:
    """Return what the pickle of *archive* describes."""
    if archive.has("byteorder") and archive.read("byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")
    return Unpickler(io.BytesIO(archive.read("data.pkl")), archive).load()


@contextmanager
def _opened(path: Place) -> Iterator[IO[bytes]]:
    try:
        stream = open_ranges(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"{path}: no such file") from error
    try:
        yield stream
    finally:
        if isinstance(path, Path):  # a remote one holds nothing open, and remembers what it fetched
            stream.close()


@contextmanager
def naming(path: Place) -> Iterator[None]:
    """Name the file in every error that zipfile and pickle raise of its bytes."""
    try:
        yield
    except RefusedGlobal as refused:
        raise DamagedError(
            f"{path}: loading it would call {refused}, which no checkpoint needs; it was not called. "
            "If you trust the file, load it with torch and save it again without that object"
        ) from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise DamagedError(f"{path}: cut off or damaged ({error}); copy it again or use an older checkpoint") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to before the file's begin
            raise
        raise DamagedError(f"{path}: its directory names places that are not in it; copy it again") from error
    except _MALFORMED as error:
        raise DamagedError(f"{path}: not what torch.save writes ({error})") from error


def is_zip(path: Place) -> bool:
    """Say whether a file begins as a zip does: torch writes them since 1.6."""
    with _opened(path) as stream:
        return stream.read(2) == b"PK"


def _refuse_old_format(path: Place, stream: IO[bytes]) -> None:
    magic = stream.read(2)
    stream.seek(0)
    if magic[:1] == b"\x80":
        raise UsageError(
            f"{path}: saved without zip (checkpoint_serialization: false); load it with "
            "torch.load(..., weights_only=False) and torch.save it again in place"
        )
