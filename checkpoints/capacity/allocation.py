"""Measure, probe and take disk space.

That is what a folder holds, what a file system gives, and space taken ahead.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ... import files
from ...errors import is_no_room

RESERVE_NAME = ".reserve"
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def allocate(descriptor: int, num_bytes: int) -> None:
    """Give the open file *num_bytes* of disk space before it is written.

    A full disk is then known at once. It asks fallocate(2) itself: where a file system has none (NFS before 4.2), the C
    library's posix_fallocate would write a byte into every block. There the size is set, and the free space, which is
    all that can be asked, must be enough.

    Raises:
        OSError: ENOSPC or EDQUOT when the space is not there.
    """
    error = _fallocate(descriptor, num_bytes)
    if error in _UNSUPPORTED:
        space = os.fstatvfs(descriptor)
        is_known = space.f_blocks > 0
        if is_known and num_bytes > space.f_bavail * space.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, num_bytes)
        return
    if error:
        raise OSError(error, os.strerror(error))


def _fallocate(descriptor: int, num_bytes: int) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "fallocate"):
        return errno.ENOSYS
    size = ctypes.c_long
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, size, size)
    while library.fallocate(descriptor, 0, 0, num_bytes) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            return error
    return 0


def start_writing(descriptor: int, offset: int, num_bytes: int) -> None:
    """Ask the kernel to write these bytes to disk now, without waiting.

    The sync at the end then has little left. sync_file_range(2) with SYNC_FILE_RANGE_WRITE; where there is none, the
    sync does it all.
    """
    ask = _sync_file_range()
    if ask is not None:
        ask(descriptor, offset, num_bytes, 2)


@functools.lru_cache(maxsize=1)
def _sync_file_range() -> Callable[..., int] | None:
    ask: Callable[..., int] | None = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if ask is not None:
        ask.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)  # type: ignore[attr-defined]
    return ask


def measure_usage(folder: Path) -> int:
    """Return what *folder* and all below it hold, as `du` and a quota count.

    Both count blocks, or sizes where more. Links are not followed, and a file with several names counts once.
    """
    total, seen, folders = 0, set(), [str(folder)]
    while folders:
        place = folders.pop()
        with suppress(FileNotFoundError, NotADirectoryError):  # removed since it was seen
            total += _held(os.lstat(place))
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if status.st_nlink == 1 or status.st_ino not in seen:
                            total += _held(status)
                            seen.add(status.st_ino)
    return total


def _held(status: os.stat_result) -> int:
    return max(status.st_size, status.st_blocks * 512)


def probe_free_bytes(folder: Path, num_bytes: int) -> int:
    """Return how many of *num_bytes* the file system gives.

    All of them are asked for, and given back at once. A probe: what no figure shows, another user's quota say, shows
    here. Found to one part in 1024.
    """
    if num_bytes <= 0 or _can_take(folder, num_bytes):
        return max(0, num_bytes)
    least, most = 0, num_bytes
    while most - least > num_bytes // 1024 + 1:
        middle = (least + most) // 2
        least, most = (middle, most) if _can_take(folder, middle) else (least, middle)
    return least


def _can_take(folder: Path, num_bytes: int) -> bool:
    path = folder / f"{files.TEMPORARY_PREFIX}probe"
    try:
        with path.open("wb") as stream:
            allocate(stream.fileno(), num_bytes)
    except OSError as error:
        if not is_no_room(error):
            raise
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def keep_reserve(folder: Path, num_bytes: int) -> None:
    """Make *folder* hold a reserve file of *num_bytes*; 0 releases it.

    It is really allocated, for the last save.

    Raises:
        OSError: ENOSPC or EDQUOT; there is no reserve then.
    """
    path = folder / RESERVE_NAME
    if num_bytes == 0:
        path.unlink(missing_ok=True)
        return
    try:
        with path.open("ab") as stream:
            if os.fstat(stream.fileno()).st_size != num_bytes:
                allocate(stream.fileno(), num_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise
