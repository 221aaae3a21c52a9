"""Two ways of looking that all looks share: collect every reason, and remember what was seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import files
from ..errors import PlanError, UsageError
from ..rundir import cache_dir

_FORMAT = 3


def collect(reasons: list[str], look: Callable[[], Any]) -> Any:
    """Return what *look* sees, or None after adding to *reasons* why it cannot."""
    try:
        return look()
    except PlanError as error:
        reasons += error.reasons
    except UsageError as error:
        reasons.append(str(error))
    return None


def cached(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Return the remembered value of *key*, or make and remember it; both are plain JSON values."""
    value = recall(kind, key)
    if value is None:
        value = make()
        remember(kind, key, value)
    return value


def recall(kind: str, key: Any) -> Any:
    """Return the remembered value of *key*, None where there is none."""
    try:
        return files.read_json(_place(kind, key))
    except (OSError, ValueError):
        return None


def remember(kind: str, key: Any, value: Any) -> None:
    """Remember the plain JSON *value* of *key*."""
    files.make_private_dir(_place(kind, key).parent)
    files.write_json(_place(kind, key), value)


def _place(kind: str, key: Any) -> Path:
    return cache_dir() / kind / f"{files.digest_of([_FORMAT, key])}.json"


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, read once as long as path, size, time and inode stay."""
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return str(cached("digests", key, lambda: files.digest_file(path)))
