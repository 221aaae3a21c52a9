"""Take the room of a file before it is written, so that a full disk is known at second zero."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def reserve(descriptor: int, num_bytes: int) -> None:
    """Give the open file *num_bytes* of room on disk.

    Asks fallocate(2) itself: where a store has none (NFS before 4.2), the C library's
    posix_fallocate would write a byte into every block. There the size is set, and the free
    space, which is all that can be asked, must be enough.

    Raises:
        OSError: ENOSPC or EDQUOT when the room is not there.
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
    """Ask the kernel to write these bytes to disk now, without waiting: the sync at the end then has little left.

    sync_file_range(2) with SYNC_FILE_RANGE_WRITE; where there is none, the sync does it all.
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
