"""Move checkpoints to an fsspec URL: uploaded, read back and compared, and only then removed here."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import files
from ..errors import RunError
from .commit import MARKER, Checkpoint

_BLOCK_BYTES = 8 << 20


def upload(checkpoint: Checkpoint, url: str, check_fence: Callable[[], None]) -> None:
    """Copy a committed checkpoint below *url*, its marker last; what is there whole already is left.

    An archive that was cut off has no marker, so it is no checkpoint; the next upload writes it anew.

    Raises:
        RunError: the archive cannot be reached, or does not give back what it was sent.
    """
    import fsspec

    names = [*sorted(files.read_json(checkpoint.path / MARKER)["files"]), MARKER]
    try:
        store, root = fsspec.core.url_to_fs(url)
        target = posixpath.join(root, checkpoint.path.name)
        marker = (checkpoint.path / MARKER).read_bytes()
        if store.exists(f"{target}/{MARKER}") and store.cat_file(f"{target}/{MARKER}") == marker:
            return
        for name in names:
            check_fence()
            _copy(store, checkpoint.path / name, f"{target}/{name}")
    except (OSError, ValueError, ImportError) as error:
        raise RunError(f"the archive {url} did not take {checkpoint.path.name}: {error}") from error


def _copy(store: Any, path: Path, target: str) -> None:
    """Copy one file and compare what the store gives back."""
    store.makedirs(posixpath.dirname(target), exist_ok=True)
    sent, found = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as source, store.open(target, "wb") as sink:
        while block := source.read(_BLOCK_BYTES):
            sent.update(block)
            sink.write(block)
    with store.open(target, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            found.update(block)
    if sent.digest() != found.digest():
        raise OSError(f"{target} is not what was sent")
