"""Read and write folders and files here, or behind any URL.

fsspec must know the URL's protocol; nothing else imports fsspec. `RemotePath` has the few methods of `pathlib.Path`
that are needed, so the same code handles both.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from .errors import DamagedError, RunError, SousbatchError, UsageError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What is asked for at once while headers are read; weights are asked for exactly.
_BLOCK_BYTES = 1 << 14
_NUM_BLOCKS = 32
_NUM_THREADS = 16
_COPY_BYTES = 8 << 20
# These read through one open file or connection, and where one thread seeks another would read.
_ONE_AT_A_TIME = frozenset({"tar", "zip", "libarchive", "ftp"})
_TURN = threading.RLock()
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class RemotePath:
    """A place behind a URL. *path* is what its file system calls it."""

    fs: AbstractFileSystem
    path: str

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.fs, f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.fs, self.path.rstrip("/").rpartition("/")[0])

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what the folder holds; nothing where there is none."""
        return (RemotePath(self.fs, entry["name"].rstrip("/")) for entry in self._entries())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def is_dir(self) -> bool:
        return bool(self._entries())

    def exists(self) -> bool:
        return any(path.name == self.name for path in self.parent.iterdir())

    def is_file(self) -> bool:
        entries = self.parent._entries()
        return any(
            entry["name"].rstrip("/").rpartition("/")[2] == self.name and entry["type"] == "file" for entry in entries
        )

    def read_bytes(self) -> bytes:
        with self._asked("read"):
            return bytes(self.fs.cat_file(self.path))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def num_bytes(self) -> int:
        with self._asked("read"):
            size = self.fs.info(self.path)["size"]
        if size is None:
            raise DamagedError(f"{self}: its server does not say how large it is, so it cannot be read by ranges")
        return int(size)

    def stamp(self) -> str:
        """Return a text that changes when the file is replaced."""
        with self._asked("read"):
            info = self.fs.info(self.path)
        return " ".join(str(info.get(key, "")) for key in ("size", "ETag", "etag", "mtime", "LastModified"))

    def write_bytes(self, content: bytes) -> None:
        """Put *content* there; the folders above are made where the store has any."""
        with self._asked("written"):
            self.fs.makedirs(self.parent.path, exist_ok=True)
            self.fs.pipe_file(self.path, content)

    def read_blocks(self) -> Iterator[bytes]:
        """Yield the content in blocks."""
        with self._asked("read"), self.fs.open(self.path, "rb") as stream:
            while block := stream.read(_COPY_BYTES):
                yield block

    def write_blocks(self, blocks: Iterable[bytes]) -> None:
        """Put blocks there, one after another.

        The folders above are made where the store has any.
        """
        with self._asked("written"):
            self.fs.makedirs(self.parent.path, exist_ok=True)
            with self.fs.open(self.path, "wb") as stream:
                for block in blocks:
                    stream.write(block)

    def upload(self, file: Path) -> None:
        """Put a file's content there."""
        with self._asked("written"):
            self.fs.put_file(str(file), self.path)

    def remove(self) -> None:
        """Remove the file, or the folder with all below it."""
        with self._asked("removed"):
            self.fs.rm(self.path, recursive=True)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Name the place in every error of a store.

        Each store has errors of its own, of no common class.
        """
        try:
            with _TURN if _ONE_AT_A_TIME & set(_protocols(self.fs)) else nullcontext():
                yield
        except (FileNotFoundError, SousbatchError):
            raise
        except Exception as error:
            raise RunError(f"{self}: cannot be {what}: {error or type(error).__name__}; try again later") from error

    def _entries(self) -> list[dict[str, Any]]:
        try:
            with self._asked("listed"):  # with the slash: a web server lists no other folders
                entries: list[dict[str, Any]] = self.fs.ls(self.path.rstrip("/") + "/", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # An object store may list the folder itself, a web server the folder above.
        return [entry for entry in entries if entry["name"].rstrip("/").startswith(self.path.rstrip("/") + "/")]


Place = Path | RemotePath


def parse_place(text: str) -> Place:
    """Return the folder or file that a path or a URL names.

    Raises:
        UsageError: no file system is known for the URL; the package that it needs is named.
    """
    if "://" not in text:
        return Path(text).expanduser()
    import fsspec  # 0.14 s, for URLs only

    try:
        fs, path = fsspec.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{text}: {error}") from error
    return Path(path) if "file" in _protocols(fs) else RemotePath(fs, path)


def _protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def list_folder(folder: Place) -> list[Place]:
    """Return what a folder holds, by name."""
    entries: list[Place] = [*folder.iterdir()]
    return sorted(entries, key=lambda place: place.name)


def read_size(place: Place) -> int:
    """Return the size of a file."""
    return place.stat().st_size if isinstance(place, Path) else place.num_bytes()


def read_stamp(place: Place) -> str:
    """Return a text that changes when a file is replaced.

    It has the size, and the date where the store has one.
    """
    if isinstance(place, Path):
        found = place.stat()
        return f"{found.st_size} {found.st_mtime_ns}"
    return place.stamp()


def read_blocks(place: Place) -> Iterator[bytes]:
    """Yield the content of a file in blocks."""
    if isinstance(place, RemotePath):
        yield from place.read_blocks()
        return
    with place.open("rb") as stream:
        while block := stream.read(_COPY_BYTES):
            yield block


def copy_verified(source: Path, target: Place) -> None:
    """Copy a file, read the copy back and compare it.

    The folders above *target* are made.

    Raises:
        RunError: the store does not take it, or does not give back what it was sent.
    """
    sent, found = hashlib.sha256(), hashlib.sha256()

    def sending() -> Iterator[bytes]:
        for block in read_blocks(source):
            sent.update(block)
            yield block

    if isinstance(target, RemotePath):
        target.write_blocks(sending())
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as stream:
            stream.writelines(sending())
    for block in read_blocks(target):
        found.update(block)
    if sent.digest() != found.digest():
        raise RunError(f"{target} is not what was sent")


def open_ranges(place: Place) -> IO[bytes]:
    """Open a file for reading little, anywhere in it."""
    return place.open("rb") if isinstance(place, Path) else cast(IO[bytes], _Ranges(place))


def map_in_threads(read: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """Return what *read* says of each item, in order.

    Many calls wait at a time, because answers from far away come late.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(read, items))


def check_inner_name(folder: Place, name: str) -> str:
    """Return *name* where it names something in *folder*.

    A file may say `../../etc` instead.

    Raises:
        DamagedError: it leads elsewhere.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise DamagedError(f"{folder}: it names {name!r}, which does not lie in it; that file was not opened")
    return name


class Positioned(io.RawIOBase):
    """A readable stream of a known size; how bytes are read is left to the subclass."""

    def __init__(self, num_bytes: int) -> None:
        self._size = num_bytes
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(22, "seek before the begin")
        self._position = start + offset
        return self._position


class _Ranges(Positioned):
    """A remote file whose small reads come from blocks that were fetched before."""

    def __init__(self, place: RemotePath) -> None:
        super().__init__(read_size(place))
        self._place = place
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read(self, size: int = -1, /) -> bytes:
        end = self._size if size < 0 else min(self._size, self._position + size)
        begin = min(self._position, end)
        self._position = end
        if end - begin > _BLOCK_BYTES:
            return self._fetch(begin, end)
        first, last = begin // _BLOCK_BYTES, max(begin, end - 1) // _BLOCK_BYTES
        joined = b"".join(self._block(number) for number in range(first, last + 1)) if end > begin else b""
        return joined[begin - first * _BLOCK_BYTES : end - first * _BLOCK_BYTES]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            begin = number * _BLOCK_BYTES
            self._blocks[number] = self._fetch(begin, min(self._size, begin + _BLOCK_BYTES))
            if len(self._blocks) > _NUM_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def _fetch(self, begin: int, end: int) -> bytes:
        return read_ranges([(self._place, begin, end)])[0]


def read_ranges(wanted: Sequence[tuple[RemotePath, int, int]]) -> list[bytes]:
    """Return ranges of bytes of files of one store.

    A range has its first byte and its end. As many are read at once as the file system can.

    Raises:
        RunError: the store does not answer.
        UsageError: its server does not serve ranges.
        DamagedError: it gave less than was asked for.
    """
    first = wanted[0][0]
    paths, begins, ends = ([part for part in parts] for parts in zip(*wanted, strict=True))
    with first._asked("read"):
        found = first.fs.cat_ranges([path.path for path in paths], begins, ends, on_error="raise")
    for (path, begin, end), content in zip(wanted, found, strict=True):
        if len(content) > end - begin:
            raise UsageError(
                f"{path}: its server does not serve ranges (it gave {len(content):,} bytes where {end - begin:,} were "
                "asked for); download the checkpoint first, or use a server that does, such as nginx"
            )
        if len(content) != end - begin:
            raise DamagedError(f"{path}: gave {len(content)} bytes where {end - begin} were asked for")
    return list(found)
