"""Shared parts of inspection: collect every reason, digest files, make them once."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import xxhash

from ... import files
from ...checkpoints.capacity.limits import read_limits, tightest
from ...errors import PlanError, UsageError, is_no_room
from ...user_folders import cache_dir, cached
from ..schema import Recipe


def collect(reasons: list[str], look: Callable[[], Any]) -> Any:
    """Return what *look* sees, or None after adding to *reasons* why it cannot."""
    try:
        return look()
    except PlanError as error:
        reasons += error.reasons
    except UsageError as error:
        reasons.append(str(error))
    except OSError as error:
        if not is_no_room(error):
            raise
        reasons.append(f"the cache {cache_dir()} is full; free some space, or set SOUSBATCH_CACHE to another folder")
    return None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes.

    They are read once as long as path, size, time and inode stay.
    """
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return str(cached("digests", key, lambda: files.digest_file(path)))


def weights_digest(path: Path) -> str:
    """Return what says whether a file of weights is another one.

    In the hub's cache that is the file's own name there, its sha256 (huggingface_hub, "Understand caching"). Else it is
    the xxh3_128, remembered as `file_digest` is: sha256 took most of a cold plan of a large model.
    """
    stored = path.resolve()
    if stored.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", stored.name):
        return stored.name
    stat = path.stat()
    key = ["xxh3_128", str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return str(cached("digests", key, lambda: files.digest_file(path, xxhash.xxh3_128)))


def made_once(path: Path, what: str, num_bytes: int, write: Callable[[IO[bytes]], None]) -> Path:
    """Return the file *path* of the cache, which *write* fills where it is missing.

    It will have *num_bytes* at least. Of several processes that want it one makes it, and the others wait.

    Raises:
        UsageError: the cache has no room for *what* it is.
    """
    if path.is_file():
        return path
    files.make_private_dir(path.parent)
    with files.locked(path.with_name(f"{path.name}.lock")):
        if path.is_file():
            return path
        limit = tightest(read_limits(path.parent))
        if num_bytes > (limit.num_bytes or 0):
            raise _no_room(what, f"can take {_gb(limit.num_bytes or 0)} ({limit.source})", num_bytes)
        try:
            with files.replacing(path) as stream:
                write(stream)
        except Exception as error:  # a full disk has many names, and those that fetch give it more
            if not is_no_room(error):
                raise
            raise _no_room(what, "became full", num_bytes) from error
    return path


def _no_room(what: str, why: str, num_bytes: int) -> UsageError:
    needs = f" of {_gb(num_bytes)} or more" if num_bytes else ""
    return UsageError(
        f"{what}: the cache {cache_dir()} {why}, and is to hold a copy{needs}; free some space, or set SOUSBATCH_CACHE "
        "to a folder with more"
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3g} GB"


def code_digest(recipe: Recipe) -> str:
    """Return the digest of the recipe's code folders."""
    return code_digest_of(code_folders(recipe))


def code_folders(recipe: Recipe) -> list[Path]:
    """Return the recipe's code folders as absolute paths."""
    return [Path(folder).expanduser().absolute() for folder in recipe.environment.code]


def jobs_python(recipe: Recipe, folders: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return the Python of the jobs, and an environment where it finds *folders*.

    Their modules can be imported there. The Python of a container is not known here.
    """
    spec = recipe.environment
    python = sys.executable if spec.container else spec.python or sys.executable
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    return python, {**os.environ, **spec.variables, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def code_digest_of(folders: Sequence[Path]) -> str:
    """Return one digest over names and bytes of every file of *folders*."""
    digest = hashlib.sha256()
    for root in folders:
        if not root.is_dir():
            raise UsageError(f"environment.code: {str(root)!r} is not a folder")
        for path in sorted(code_files(root)):
            digest.update(f"{root.name}/{path.relative_to(root)}\0{files.digest_file(path)}\n".encode())
    return digest.hexdigest()


def code_files(root: Path) -> list[Path]:
    """Return the files of a code folder.

    Caches, version control and environments are left out.
    """
    skipped = {"__pycache__", ".git", ".venv", "venv", "node_modules", ".mypy_cache", ".ruff_cache", "runs", "wandb"}
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)
        found += [Path(folder, name) for name in names if not os.path.islink(os.path.join(folder, name))]
    return found
