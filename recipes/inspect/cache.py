"""Shared parts of inspection: collect every reason, and digest a file once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ... import files
from ...errors import PlanError, UsageError
from ...user_folders import cached


def collect(reasons: list[str], look: Callable[[], Any]) -> Any:
    """Return what *look* sees, or None after adding to *reasons* why it cannot."""
    try:
        return look()
    except PlanError as error:
        reasons += error.reasons
    except UsageError as error:
        reasons.append(str(error))
    return None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes.

    They are read once as long as path, size, time and inode stay.
    """
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return str(cached("digests", key, lambda: files.digest_file(path)))
