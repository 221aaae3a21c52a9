"""Shared parts of inspection: collect every reason, digest files and code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ... import files
from ...errors import PlanError, UsageError
from ...user_folders import cached
from ..schema import Recipe


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


def code_digest(recipe: Recipe) -> str:
    """Return the digest of the recipe's code folders."""
    return code_digest_of(code_folders(recipe))


def code_folders(recipe: Recipe) -> list[Path]:
    """Return the recipe's code folders as absolute paths."""
    return [Path(folder).expanduser().absolute() for folder in recipe.environment.code]


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
