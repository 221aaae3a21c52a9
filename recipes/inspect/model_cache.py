"""Keep models that were fetched or converted in the user's cache, each made once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ... import files
from ...checkpoints.capacity.limits import read_limits, tightest
from ...errors import UsageError, is_no_room
from ...user_folders import cache_dir

logger = logging.getLogger(__name__)


def models_dir() -> Path:
    """Return the folder of the cache that holds models."""
    return cache_dir() / "models"


def made_once(what: str, name: str, num_bytes: int, make: Callable[[Path], None]) -> Path:
    """Return the folder *name* of the cache, made by *make* where it is not there.

    *make* gets an empty folder, which appears under its name when it is complete. Two plans that want one folder wait
    for each other. *what* names the model in errors.

    Raises:
        UsageError: the cache cannot take *num_bytes*, or filled up meanwhile; nothing half is left there.
    """
    root, target = files.make_private_dir(models_dir()), models_dir() / name
    if target.is_dir():
        return target
    lock = root / f".{name}.lock"
    with files.locked(lock, wait=False) as held:
        if held is not None:
            return _make(what, target, num_bytes, make)
    logger.warning("%s is being made ready by another plan; waiting for it", what)
    with files.locked(lock):
        return _make(what, target, num_bytes, make)


def _make(what: str, target: Path, num_bytes: int, make: Callable[[Path], None]) -> Path:
    if target.is_dir():
        return target
    for left in target.parent.glob(f"{files.TEMPORARY_PREFIX}{target.name}.*"):  # by a plan that was killed
        files.discard(left)
    check_space(what, num_bytes, target.parent, "SOUSBATCH_CACHE")
    temporary = files.temporary_path(target)
    temporary.mkdir()
    try:
        make(temporary)
        files.sync_tree(temporary)
        temporary.rename(target)
        files.sync_dir(target.parent)
    except BaseException as error:
        files.discard(temporary)
        if is_no_room(error):
            raise UsageError(
                f"{what}: the disk of the cache {target.parent} is full; free some space, or set SOUSBATCH_CACHE to a "
                "folder with more"
            ) from error
        raise
    return target


def check_space(what: str, num_bytes: int, folder: Path, variable: str) -> None:
    """Refuse what the cache *folder* cannot take.

    *variable* is the environment's name for it.

    Raises:
        UsageError: with both sizes.
    """
    limit = tightest(read_limits(folder))
    if num_bytes > (limit.num_bytes or 0):
        raise UsageError(
            f"{what} needs {num_bytes / 1e9:,.3g} GB in the cache {folder}, which can take "
            f"{(limit.num_bytes or 0) / 1e9:,.3g} GB ({limit.source}); set {variable} to a folder with more free space"
        )
