"""`manifest.json`: what a consolidated folder holds, and its origin.

It is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

import xxhash

from ...errors import DamagedError, NotFoundError, UsageError
from ...files import digest_of
from ...remote import Place, open_ranges, read_size
from ..formats.safetensors_file import read_tensors
from ..formats.tensors import DTYPES, Content, SourceTensor

MANIFEST_NAME = "manifest.json"
_FORMAT = 3
Algorithm = Literal["sha256", "xxh3_128"]
# sha256 is what format 2 has. It took half of the time of a consolidation (1.6 GB/s a core, where xxh3 makes 20), and
# guards against accidents no better: an attacker who can change a weight can change the manifest beside it.
ALGORITHMS: Mapping[Algorithm, Callable[[], Any]] = MappingProxyType(
    {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
)
ALGORITHM: Algorithm = "xxh3_128"
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One of the small files."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One safetensors file of a model.

    It has the digest of its header, and by name that of each tensor's bytes; None: not taken. *algorithm* is that of
    the tensors' digests. A record without one is of a version that knew sha256 only.
    """

    name: str
    num_bytes: int
    header_sha256: str
    tensors: Mapping[str, str] | None
    algorithm: Algorithm = "sha256"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A consolidated model or adapter.

    *digest* is its identity: the sha256 of all digests of its files; None when none were taken. *request* stands
    for the checkpoint and the options that it was made of.
    *num_params* counts the elements of all tensors written, buffers too. *num_overflowing* names
    the tensors with values beyond the dtype asked for: they were clamped, or the whole model
    was written in bfloat16 (see *dtype*). *num_flushed* values became zero; None when they were not counted.
    """

    dtype: str
    content: Content
    source: str
    kind: str
    tag: str
    step: int | None
    zero_stage: int | None
    world_size: int
    ds_version: str
    num_params: int
    num_bytes: int
    weights: tuple[WeightFile, ...]
    files: tuple[FileRecord, ...]
    digest: str | None
    request: str
    num_overflowing: dict[str, int]
    num_flushed: int | None
    format: int = _FORMAT


def digest_of_files(weights: tuple[WeightFile, ...], files: tuple[FileRecord, ...]) -> str | None:
    """Return the identity of a set of files: names and contents, not their order."""
    if any(file.tensors is None for file in weights):
        return None
    large = [[file.name, file.header_sha256, *(file.tensors or {}).values()] for file in weights]
    return digest_of(sorted([*large, *([file.name, file.sha256] for file in files)]))


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as plain JSON values."""
    return asdict(manifest)


def read_manifest(model_dir: Place) -> Manifest:
    """Read the manifest of a consolidated folder.

    The files that it names are not looked at.

    Raises:
        NotFoundError: there is none: the folder was not made here, or was not finished.
        UsageError: a later version of sousbatch wrote it.
        DamagedError: it is not a manifest.
    """
    path = model_dir / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] > _FORMAT:
            raise UsageError(f"{path}: has format {values['format']}, known up to {_FORMAT}; upgrade sousbatch")
        files = tuple(FileRecord(**file) for file in values["files"])
        weights = tuple(WeightFile(**file) for file in values["weights"])
        if unknown := {file.algorithm for file in weights} - set(ALGORITHMS):
            raise ValueError(f"digests of an unknown kind, {unknown}")
        return Manifest(**{**values, "files": files, "weights": weights})
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file; consolidate writes it when a model is complete") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{path}: not a manifest ({error}); remove {model_dir} and consolidate again") from error


def verify_manifest(model_dir: Place, *, reads_all: bool = True) -> Manifest:
    """Check every file of a consolidated folder against its manifest.

    They are compared by size and then by digest. Without *reads_all* by size only: that finds a file that is gone or
    was cut off, in no time.

    Raises:
        DamagedError: a file is missing or differs; the message names it, and the tensor.
    """
    manifest = read_manifest(model_dir)
    sizes = {file.name: file.num_bytes for file in manifest.files}
    sizes |= {file.name: file.num_bytes for file in manifest.weights}
    for name, num_bytes in sizes.items():
        path = model_dir / name
        found = read_size(path) if path.is_file() else None
        if found != num_bytes:
            what = f"{name} is missing" if found is None else f"{name} has {found:,} of {num_bytes:,} bytes"
            raise _differs(model_dir, what)
    if not reads_all:
        return manifest
    for small in manifest.files:
        if hashlib.sha256((model_dir / small.name).read_bytes()).hexdigest() != small.sha256:
            raise _differs(model_dir, f"{small.name} has other bytes")
    for large in manifest.weights:
        _verify_weights(model_dir, large)
    if digest_of_files(manifest.weights, manifest.files) != manifest.digest:
        raise _differs(model_dir, "its digest is not that of the files")
    return manifest


def _verify_weights(model_dir: Place, file: WeightFile) -> None:
    path = model_dir / file.name
    with open_ranges(path) as stream:
        begin = stream.read(8)
        header = begin + stream.read(min(int.from_bytes(begin, "little"), file.num_bytes))
    if hashlib.sha256(header).hexdigest() != file.header_sha256:
        raise _differs(model_dir, f"{file.name} has other bytes")
    for tensor in read_tensors(path):
        if file.tensors is not None and _compute_digest(path, tensor, file.algorithm) != file.tensors.get(tensor.name):
            raise _differs(model_dir, f"{file.name} has other bytes in {tensor.name!r}")


def _compute_digest(path: Place, tensor: SourceTensor, algorithm: Algorithm) -> str:
    digest = ALGORITHMS[algorithm]()
    left = tensor.num_elements * DTYPES[tensor.dtype].num_bytes
    with open_ranges(path) as stream:
        stream.seek(tensor.segments[0].offset_bytes)
        while left and (block := stream.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    return str(digest.hexdigest())


def _differs(model_dir: Place, what: str) -> DamagedError:
    return DamagedError(
        f"{model_dir}: is not what {MANIFEST_NAME} says ({what}); remove {model_dir} and consolidate again"
    )
