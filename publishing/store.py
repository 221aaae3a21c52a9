"""Send files to a place and ask what it holds.

A place is a folder, a URL of any file system of fsspec, or a repository of the hub.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .. import files
from ..errors import RunError, SousbatchError, UsageError
from ..redaction import redacted
from ..remote import Place, copy_verified, parse_place, read_blocks, read_size

_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)/?", re.ASCII)
_HUB_ADVICE = "`hf auth login`, or export HF_TOKEN, which a job gets by environment.inherit=[HF_TOKEN]"


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file that is to be sent.

    It has its *name* there, and its place, size and digest here.
    """

    name: str
    path: Path
    num_bytes: int
    sha256: str


class Store(Protocol):
    """A place that takes files by name.

    Each method raises RunError where it does not answer.
    """

    def open(self) -> bool:
        """Make the place, and say whether it may hold files of others."""

    def is_empty(self) -> bool:
        """Say whether it holds nothing."""

    def read(self, name: str) -> bytes | None:
        """Return what a small file holds; None where there is none."""

    def holds(self, file: LocalFile) -> bool:
        """Say whether the file is there, with the same size and the same digest."""

    def send(self, file: LocalFile) -> None:
        """Put the file there, and check that it holds what was sent."""

    def remove(self, name: str) -> None:
        """Remove a file."""


def read_file(name: str, path: Path) -> LocalFile:
    """Return the file at *path* with its size and digest."""
    return LocalFile(name=name, path=path, num_bytes=path.stat().st_size, sha256=files.digest_file(path))


def refusal_of(url: str) -> str:
    """Return why nothing can be published at *url*, or nothing.

    Only the name is looked at, and which packages are installed.
    """
    if url.startswith("hf://"):
        return "" if _HUB.fullmatch(url) else "names no repository of the hub; write hf://OWNER/NAME"
    protocol = url.partition("://")[0] if "://" in url else ""
    if protocol == "memory":
        return "would be gone when the job ends; name a folder or another URL"
    if protocol in ("http", "https"):
        return "a web server takes no files; name a folder, or a store such as s3://BUCKET/NAME"
    if not protocol and not url.startswith("/"):
        return f"is no absolute folder, such as /data/{url}, and no URL"
    try:
        parse_place(url)
    except UsageError as error:
        return str(error).removeprefix(f"{url}: ")
    return ""


def open_store(url: str, *, is_private: bool = True) -> Store:
    """Return the store that a folder or URL names.

    Raises:
        UsageError: no file system is known for the URL.
    """
    if found := _HUB.fullmatch(url):
        from huggingface_hub import HfApi  # a second, for the hub only

        return HubStore(HfApi(), found[1], is_private=is_private)
    return FileStore(parse_place(url))


@contextmanager
def _asked(where: object, what: str) -> Iterator[None]:
    """Name the place in every error of a store.

    Each kind of store has errors of its own.
    """
    try:
        yield
    except SousbatchError as error:
        if isinstance(error, UsageError):
            raise
        raise RunError(f"{where}: {what} failed: {error}") from error
    except Exception as error:
        raise RunError(f"{where}: {what} failed: {redacted(str(error)) or type(error).__name__}") from error


class FileStore:
    """A folder, here or behind a URL. What it holds is read back to be compared."""

    def __init__(self, root: Place) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def open(self) -> bool:
        if isinstance(self._root, Path):
            with _asked(self._root, "making it"):
                self._root.mkdir(parents=True, exist_ok=True)
        return False

    def is_empty(self) -> bool:
        with _asked(self._root, "listing it"):
            return not any(True for _ in self._root.iterdir())

    def read(self, name: str) -> bytes | None:
        with _asked(self._root, f"reading {name}"):
            place = self._root / name
            return place.read_bytes() if place.is_file() else None

    def holds(self, file: LocalFile) -> bool:
        with _asked(self._root, f"reading {file.name}"):
            place = self._root / file.name
            if not place.is_file() or read_size(place) != file.num_bytes:
                return False
            found = hashlib.sha256()
            for block in read_blocks(place):
                found.update(block)
            return found.hexdigest() == file.sha256

    def send(self, file: LocalFile) -> None:
        with _asked(self._root, f"sending {file.name}"):
            copy_verified(file.path, self._root / file.name)

    def remove(self, name: str) -> None:
        with _asked(self._root, f"removing {name}"):
            place = self._root / name
            place.unlink() if isinstance(place, Path) else place.remove()
            if place.is_file():  # a store may take a lost connection for a file that is gone
                raise RunError("it is still there")


class HubStore:
    """A repository of the hub, which itself tells the digests of what it holds."""

    def __init__(self, api: Any, repository: str, *, is_private: bool) -> None:
        self._api, self._repository, self._is_private = api, repository, is_private

    def __str__(self) -> str:
        return f"hf://{self._repository}"

    def open(self) -> bool:
        with self._asked("making the repository"):
            self._api.create_repo(self._repository, private=self._is_private, exist_ok=True)
        return True  # its history keeps what is replaced

    def is_empty(self) -> bool:
        with self._asked("listing it"):
            return not self._api.list_repo_files(self._repository)

    def read(self, name: str) -> bytes | None:
        with self._asked(f"reading {name}"), tempfile.TemporaryDirectory(prefix="sousbatch-") as folder:
            if not self._api.get_paths_info(self._repository, [name]):
                return None
            return Path(self._api.hf_hub_download(self._repository, name, local_dir=folder)).read_bytes()

    def holds(self, file: LocalFile) -> bool:
        with self._asked(f"looking for {file.name}"):
            for found in self._api.get_paths_info(self._repository, [file.name]):
                if found.lfs is not None:
                    return bool((found.size, found.lfs.sha256) == (file.num_bytes, file.sha256))
                return bool(found.size == file.num_bytes and found.blob_id == _git_digest(file))
        return False

    def send(self, file: LocalFile) -> None:
        with self._asked(f"sending {file.name}"):
            self._api.upload_file(
                path_or_fileobj=str(file.path),
                path_in_repo=file.name,
                repo_id=self._repository,
                commit_message=f"Publish {file.name}",
            )
        if not self.holds(file):
            raise RunError(f"{self}: {file.name} is not what was sent")

    def remove(self, name: str) -> None:
        with self._asked(f"removing {name}"):
            self._api.delete_file(name, self._repository, commit_message=f"Remove {name}")

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        try:
            with _asked(self, what):
                yield
        except RunError as error:
            cause = error.__cause__
            status = getattr(getattr(cause, "response", None), "status_code", None)
            if status in (401, 403) or type(cause).__name__ == "LocalTokenNotFoundError":
                raise RunError(f"{error}; {_HUB_ADVICE}") from error
            raise


def _git_digest(file: LocalFile) -> str:
    """Return the digest that git, and so the hub, gives a small file.

    It is the sha1 of a head and the content, as git hashes a blob.
    """
    digest = hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)
    digest.update(file.path.read_bytes())
    return digest.hexdigest()
