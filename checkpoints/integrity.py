"""Open a checkpoint to make a model of it.

The files that lie there must be those that its marker vouches for. A rank's file in the place of another's, or out of
another checkpoint, is intact in itself, and its checksums are right: only the marker knows that it was not committed
there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DamagedError, UsageError
from ..files import TEMPORARY_PREFIX, digest_file
from ..remote import Place, map_in_threads, open_ranges, read_size
from .commit import MARKER, is_name_of_save, zip_directory
from .formats.detect import open_source
from .formats.tensors import Source


def open_verified(path: Place, *, is_raw: bool = False) -> Source:
    """Return what `open_source` finds.

    Its files with weights are compared with the marker where there is one. Of torch files that is their directories:
    the bytes are compared with these as they are read. Others are read once more, unless they are far away: an archive
    was compared when it was written.

    Raises:
        UsageError: a save of ours that was never committed.
        DamagedError: a file is not the one that was committed; and as `open_source`.
    """
    _refuse_cut_off(path.absolute() if isinstance(path, Path) else path)
    source = open_source(path, is_raw=is_raw)
    folder = next((place for place in (path, path.parent) if (place / MARKER).is_file()), None)
    if folder is not None:
        entries = _entries(folder / MARKER)
        named = {str(folder / name): (name, entry) for name, entry in entries.items()}
        todo = [(place, *named[str(place)]) for place in sorted(_files_of(source), key=str) if str(place) in named]
        map_in_threads(lambda each: _check(*each), todo)
    return source


def _refuse_cut_off(path: Place) -> None:
    for folder in (path, path.parent):
        if not is_name_of_save(folder.name) or not folder.is_dir():
            continue
        if folder.name.startswith(TEMPORARY_PREFIX) or not (folder / MARKER).is_file():
            raise UsageError(
                f"{folder}: was never committed: it is what a save or a removal left that was killed; use another "
                "checkpoint, or rename it if another trainer wrote it"
            )


def _entries(marker: Place) -> Mapping[str, Mapping[str, Any]]:
    try:
        entries = json.loads(marker.read_text(encoding="utf-8"))["files"]
        return {name: {"num_bytes": entry["num_bytes"]} | entry for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"the marker {marker} cannot be read: {error}") from error


def _files_of(source: Source) -> set[Place]:
    return {segment.path for tensor in _tensors_of(source) for segment in tensor.segments}


def _tensors_of(source: Source) -> Iterator[Any]:
    for tensor in (*source.tensors, *(source.base.tensors if source.base else ())):
        yield tensor
        if tensor.working_copy is not None:
            yield tensor.working_copy


def _check(place: Place, name: str, entry: Mapping[str, Any]) -> None:
    if read_size(place) != entry["num_bytes"]:
        is_same = False
    elif "zip_directory" in entry:
        with open_ranges(place) as stream:
            is_same = zip_directory(stream) == entry["zip_directory"]
    else:
        is_same = not isinstance(place, Path) or digest_file(place) == entry["sha256"]
    if not is_same:
        raise DamagedError(
            f"{place}: is another file than was committed as {name}; copy that one there, or use another checkpoint"
        )
