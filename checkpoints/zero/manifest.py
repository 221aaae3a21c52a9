"""`manifest.json`: what a consolidated folder holds and where it came from; it is written last."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DamagedError, NotFoundError, UsageError
from ...files import digest_file, digest_of, read_json
from .source import Content

MANIFEST_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the folder."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A consolidated model or adapter.

    *digest* is its identity: the sha256 of the sorted (name, sha256) pairs of its files.
    *num_params* counts the elements of all tensors written, buffers too. *num_overflowing* names
    the tensors with values beyond the dtype asked for: they were clamped, or the whole model
    was written in bfloat16 (see *dtype*). *num_flushed* values became zero; None when they were not counted.
    """

    dtype: str
    content: Content
    tag: str
    step: int | None
    zero_stage: int | None
    world_size: int
    ds_version: str
    num_params: int
    num_bytes: int
    files: tuple[FileRecord, ...]
    digest: str
    num_overflowing: dict[str, int]
    num_flushed: int | None
    format: int = _FORMAT


def digest_of_files(files: tuple[FileRecord, ...]) -> str:
    """Return the identity of a set of files: names and contents, not their order."""
    return digest_of(sorted([file.name, file.sha256] for file in files))


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as plain JSON values."""
    return asdict(manifest)


def read_manifest(model_dir: Path) -> Manifest:
    """Read the manifest of a consolidated folder, without looking at the files that it names.

    Raises:
        NotFoundError: there is none: the folder was not made here, or was not finished.
        UsageError: a later version of sousbatch wrote it.
        DamagedError: it is not a manifest.
    """
    path = model_dir / MANIFEST_NAME
    try:
        values = read_json(path)
        if values["format"] > _FORMAT:
            raise UsageError(f"{path}: has format {values['format']}, known up to {_FORMAT}; upgrade sousbatch")
        files = tuple(FileRecord(**file) for file in values["files"])
        return Manifest(**{**values, "files": files})
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file; consolidate writes it when a model is complete") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{path}: not a manifest ({error}); consolidate again") from error


def verify_manifest(model_dir: Path) -> Manifest:
    """Check every file of a consolidated folder against its manifest, by size and then by sha256.

    Raises:
        DamagedError: a file is missing or differs; the message names it.
    """
    manifest = read_manifest(model_dir)
    for file in manifest.files:
        path = model_dir / file.name
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
            raise DamagedError(f"{path}: {found}, {MANIFEST_NAME} says {file.num_bytes}; consolidate again")
    for file in manifest.files:
        if digest_file(model_dir / file.name) != file.sha256:
            raise DamagedError(
                f"{model_dir / file.name}: its bytes are not those of {MANIFEST_NAME}; consolidate again"
            )
    if digest_of_files(manifest.files) != manifest.digest:
        raise DamagedError(f"{model_dir / MANIFEST_NAME}: its digest is not that of its files; consolidate again")
    return manifest
