"""Send a publication: verified, resumable, its list of files last.

While files are sent `publication.part.json` says whose they are, and there is no `publication.json`: a publication that
was cut off is seen as such, and the next one sends what is missing or differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .store import FileStore, LocalFile, Store, read_file

PUBLICATION_NAME = "publication.json"
PART_NAME = "publication.part.json"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What is there now, and how many of the files were sent for it."""

    num_files: int
    num_bytes: int
    num_sent: int


def send(
    about: Mapping[str, Any],
    contents: Mapping[str, Path],
    store: Store,
    *,
    work: Path,
    before_each: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Publication:
    """Publish the files *contents*, by their names there, to *store*.

    *about* says what they are; its `run` owns the place. *work* is a folder for files that are made here.

    Raises:
        UsageError: the place holds another run's publication, or files that are none.
        RunError: the store does not answer, or does not hold what it was sent; the same call resumes it.
    """
    found = [read_file(name, path) for name, path in sorted(contents.items())]
    listed = [{"name": file.name, "num_bytes": file.num_bytes, "sha256": file.sha256} for file in found]
    manifest = _written(work, PUBLICATION_NAME, {**about, "files": listed})
    takes_more = store.open()
    done, begun = _lists(store, str(about["run"]), takes_more=takes_more)
    left = [file for file in found if not store.holds(file)]
    if left or done is None or not store.holds(manifest):
        if begun is None:
            store.send(_written(work, PART_NAME, {"run": about["run"]}))
            begun = b""
        if done is not None:
            store.remove(PUBLICATION_NAME)
        for number, file in enumerate(left, 1):
            before_each()
            store.send(file)
            say(f"{number} of {len(left)} files: {file.name}")
        before_each()
        store.send(manifest)
    if begun is not None:
        store.remove(PART_NAME)
    return Publication(num_files=len(found), num_bytes=sum(file.num_bytes for file in found), num_sent=len(left))


def _written(work: Path, name: str, value: Mapping[str, Any]) -> LocalFile:
    path = work / name
    path.write_text(json.dumps(dict(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return read_file(name, path)


def refuse_taken(url: str, run: str) -> None:
    """Refuse a folder that cannot take the publication of *run*.

    What lies behind a URL is not asked.

    Raises:
        UsageError: it holds another run's publication, or files that are none.
    """
    if "://" not in url and (place := Path(url)).is_dir():
        _lists(FileStore(place), run)


def _lists(store: Store, run: str, *, takes_more: bool = False) -> tuple[bytes | None, bytes | None]:
    """Return the lists of a complete and of an unfinished publication.

    Both are those of *run*; a place that holds anything else is refused.
    """
    done, begun = store.read(PUBLICATION_NAME), store.read(PART_NAME)
    for text in (done, begun):
        _refuse_other(store, text, run)
    if done is None and begun is None and not takes_more and not store.is_empty():
        raise UsageError(f"{store}: holds files and no publication; name an empty folder, or a new one")
    return done, begun


def _refuse_other(store: Store, text: bytes | None, run: str) -> None:
    """Refuse a place of another run.

    A list that was cut off while it was written says nothing.
    """
    try:
        owner = json.loads(text or b"{}").get("run", run)
    except (ValueError, AttributeError):
        return
    if owner != run:
        raise UsageError(f"{store}: holds the publication of run {owner}; name another place, or remove that one")
