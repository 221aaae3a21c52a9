"""Read a `torch.save` file with the standard library: where its tensors lie, and nothing that runs.

The file is a zip whose records are stored, not compressed: one pickle, and one record per storage.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ...errors import DamagedError, NotFoundError, UsageError
from .unpickle import RefusedGlobal, Unpickler

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


class _Archive:
    """The zip container: where each record's bytes begin."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path = path
        self._stream = stream
        self._zip = zipfile.ZipFile(stream)
        pickles = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} records named data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")

    def read(self, name: str) -> bytes:
        """Return a record's bytes, their CRC checked."""
        return self._zip.read(self._root + name)

    def has(self, name: str) -> bool:
        return self._root + name in self._zip.NameToInfo

    def place(self, key: str) -> tuple[int, int]:
        """Return (offset in the file, size) in bytes of a storage."""
        info = self._zip.getinfo(f"{self._root}data/{key}")
        self._stream.seek(info.header_offset)
        header = self._stream.read(30)
        if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key} is not stored plainly")
        # The local header's own lengths count: its extra field holds the alignment that torch adds.
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return info.header_offset + 30 + skip, info.file_size


def load_state(path: Path) -> Mapping[str, object]:
    """Return the mapping that *path* holds, its tensors left in the file.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it was saved by torch's old serialization, which cannot be read in place.
        DamagedError: it is cut off or not what the format says, or it calls a global that is
            not on the list: that one is named, and was not called.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as stream:
            _refuse_old_format(path, stream)
            archive = _Archive(path, stream)
            if archive.has("byteorder") and archive.read("byteorder") != b"little":
                raise ValueError("it was written on a big-endian machine")
            state = Unpickler(io.BytesIO(archive.read("data.pkl")), path, archive.place).load()
    except RefusedGlobal as refused:
        raise DamagedError(
            f"{path}: loading it would call {refused}, which no checkpoint needs; it was not called. "
            "If you trust the file, load it with torch and save it again without that object"
        ) from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError) as error:
        raise DamagedError(f"{path}: cut off or damaged ({error}); copy it again or use an older checkpoint") from error
    except _MALFORMED as error:
        raise DamagedError(f"{path}: not what torch.save writes ({error})") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{path}: holds {type(state).__name__}, not the mapping of a checkpoint")
    return state


def _refuse_old_format(path: Path, stream: IO[bytes]) -> None:
    magic = stream.read(2)
    stream.seek(0)
    if magic[:1] == b"\x80":
        raise UsageError(
            f"{path}: saved without zip (checkpoint_serialization: false); load it with "
            "torch.load(..., weights_only=False) and torch.save it again in place"
        )
