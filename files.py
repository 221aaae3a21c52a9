"""The only writer of whole files, and locks.

A file is written under a temporary name, synced and renamed: what appears under its own name is complete. A temporary
name starts with `.tmp-`, so that every reader and every cleaner recognizes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UsageError

TEMPORARY_PREFIX = ".tmp-"
_BLOCK_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """Return the one JSON text of *value*: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the sha256 hex digest of *value*'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path, new: Callable[[], Any] = hashlib.sha256) -> str:
    """Return the hex digest of a file's bytes, by a *new* one of sha256 or others."""
    digest = new()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


def make_private_dir(path: Path) -> Path:
    """Make *path* and its missing parents.

    Folders that are made here are open to the owner only.
    """
    if not path.is_dir():
        make_private_dir(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def temporary_path(path: Path) -> Path:
    """Return an unused temporary name beside *path*."""
    return path.parent / f"{TEMPORARY_PREFIX}{path.name}.{secrets.token_hex(4)}"


def final_name(name: str) -> str:
    """Return the name of a file that is being written under the temporary *name*."""
    return re.sub(rf"{re.escape(TEMPORARY_PREFIX)}([^/]+)\.[0-9a-f]{{8}}", r"\1", name)


def refuse_input(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write over what is read, and over a device or pipe.

    Raises:
        UsageError: *path* is one of *inputs*, or no regular file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is no regular file, and one would take its place; name another")
    if path.resolve() in {one.resolve() for one in inputs}:
        raise UsageError(f"{path} is read and would be written over; give the new file another name")


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary stream whose bytes become the file *path*.

    The file appears only when the block ends well. The file gets mode 0666 less the umask; its folder decides who can
    reach it.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_dir(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write *text* as the whole of *path*, atomically."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write *value* as readable JSON with sorted keys, atomically."""
    write_text(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def parse_json(text: bytes) -> Any:
    """Read one JSON value, with NaN and Infinity as Python's json writes them.

    Raises:
        ValueError: it is no JSON, or not UTF-8.
    """
    import orjson

    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
        return json.loads(text.decode())
    # orjson makes a whole number of more than 64 bits a float, and so two ids of rows the same one.
    rows = found if isinstance(found, list) else [found]
    is_rounded = any(
        type(value) is float and abs(value) >= 2**63 for row in rows if isinstance(row, dict) for value in row.values()
    )
    return json.loads(text) if is_rounded else found


def sync_tree(path: Path) -> None:
    """Make every file and folder below *path* durable.

    Links, pipes and the like are passed over.
    """
    for folder, _, names in os.walk(path):
        for file in (Path(folder, name) for name in names):
            if not stat.S_ISREG(file.lstat().st_mode):
                continue
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_dir(Path(folder))


def remove_tree(path: Path) -> None:
    """Remove a folder: rename it out of every reader's sight first, then delete it.

    Raises:
        OSError: it is out of sight, but not all of it could be deleted.
    """
    doomed = temporary_path(path)
    try:
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    if doomed.is_symlink():
        doomed.unlink()
        return
    for is_last in (False, False, True):
        try:
            return shutil.rmtree(doomed)
        except OSError as error:  # a call that found the folder before the rename may still make a file in it
            if is_last or error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise


def discard(path: Path) -> None:
    """Delete what has a temporary name already, as far as that works.

    A file that another host holds open stays for a while (NFS calls it `.nfs*`); what is left goes
    with the next one to clean up.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def num_bytes_below(path: Path) -> int:
    """Return the sum of the sizes of the regular files below *path*.

    Links are not followed.
    """
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Hold the lock file *path* and yield its descriptor.

    Yield None at once when *wait* is off and another process holds it. The kernel frees the lock when its holder dies,
    however it dies, so there is no stale lock to break. A child that is handed the descriptor holds the lock on where
    its parent is killed.
    """
    while True:
        with path.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            if _is_named(stream, path):
                try:
                    yield stream.fileno()
                finally:  # closing it would not do: a child that was forked meanwhile, as those that load rows, has it
                    fcntl.flock(stream, fcntl.LOCK_UN)
                return


def is_locked(path: Path) -> bool:
    """Say whether another holds the lock file *path*; it may not be there."""
    try:
        with path.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _is_named(stream: IO[str], path: Path) -> bool:
    """Say whether *stream* is still what *path* names.

    Its folder may have been removed while it waited.
    """
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
