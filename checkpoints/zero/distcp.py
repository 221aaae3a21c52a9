"""Folders of torch's distributed checkpoints (FSDP): `.metadata` and `*.distcp`, read in place.

torch's own reader unpickles `.metadata` with the plain pickle module, which runs what a hostile file says, and
takes whole tensors into memory. The layout is simple: each chunk of a tensor is one small `torch.save` zip.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ...errors import DamagedError, IncompleteError, UsageError
from ...files import digest_of
from .archive import load_tensor
from .places import Place, inner_name, num_bytes_of, open_ranges, stamp_of
from .source import DTYPES, Segment, Source, SourceTensor
from .unpickle import RefusedGlobal, Unpickler

METADATA_NAME = ".metadata"
# Under these, training loops put the model beside the optimizer; a folder without any of them is all model.
_MODEL_KEYS = ("model", "module", "state_dict")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_MODULE = "torch.distributed.checkpoint"
# A tensor cut along its columns has a run per row and column of chunks; each run is one read.
_MAX_RUNS = 200_000


class _Plain:
    """Stands for a dataclass of torch's metadata: takes its attributes and runs nothing."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"{name!r} is missing")
        return state[name]


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """One box of a tensor, and which part of which file holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file_name: str
    begin: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """What `.metadata` says of one tensor of the model."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


def find_distcp_dir(path: Place) -> Place | None:
    """Return the folder with the model's `.metadata`: *path* itself, or what accelerate makes in it."""
    places = (path, path / "pytorch_model_fsdp_0")
    return next((folder for folder in places if (folder / METADATA_NAME).is_file()), None)


def read_distcp(path: Place) -> Source:
    """Read where every tensor of the model in *path* lies; what belongs to the optimizer is left out.

    Raises:
        DamagedError: `.metadata` or a chunk is not what torch writes, or calls what no checkpoint needs.
        IncompleteError: a file is missing, or chunks of a tensor are.
        UsageError: nothing of a model, or a tensor that is cut into too many pieces.
    """
    metadata = path / METADATA_NAME
    content = metadata.read_bytes()
    try:
        tensors = list(_tensors(Unpickler(io.BytesIO(content), None, _known()).load()))
    except RefusedGlobal as refused:
        raise DamagedError(f"{metadata}: loading it would call {refused}; it was not called") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedError(f"{metadata}: not the metadata of a distributed checkpoint ({error})") from error
    if not tensors:
        raise UsageError(f"{path}: holds no tensors of a model; give the model's folder, not the optimizer's")
    files = _files(path, tensors)
    pieces = _pieces(files, tensors)
    return Source(
        path=path,
        content="model",
        kind="torch distributed checkpoint",
        world_size=len(files),
        tensors=tuple(_joined(path, tensor, pieces) for tensor in tensors),
        digest=digest_of([content.hex(), *(f"{name} {stamp_of(file)}" for name, file in files.items())]),
    )


def _known() -> dict[str, object]:
    """Return stand-ins for torch's classes, new ones for each file: a pickle can set attributes of what it names."""
    names = "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata StorageMeta TensorProperties"
    full = [f"{_MODULE}.metadata.{name}" for name in (*names.split(), "MetadataIndex", "_MEM_FORMAT_ENCODING")]
    full.append(f"{_MODULE}.filesystem._StorageInfo")
    return {name: type("Plain", (_Plain,), {"__init__": lambda self, *_: None}) for name in full}


def _tensors(root: Any) -> Iterator[_Tensor]:
    described: Mapping[str, Any] = root.get("state_dict_metadata")
    paths: Mapping[str, Any] = root.get("planner_data") or {}
    places: dict[tuple[str, tuple[int, ...] | None], Any] = {
        (index.get("fqn"), index.state.get("offset")): info for index, info in root.get("storage_data").items()
    }
    heads = {str(_path_of(key, paths)[0]) for key in described}
    model_key = next((key for key in _MODEL_KEYS if key in heads), None)
    for key, entry in described.items():
        path = _path_of(key, paths)
        is_model = path[0] == model_key if model_key else not str(path[0]).startswith("optim")
        if not is_model or "chunks" not in getattr(entry, "state", {}):
            continue
        chunks = {
            tuple(chunk.get("offsets")): _chunk(
                chunk, places.get((key, tuple(chunk.get("offsets")))) or places[key, None]
            )
            for chunk in entry.get("chunks")
            if math.prod(chunk.get("sizes"))
        }
        name = ".".join(str(part) for part in (path[1:] if model_key and len(path) > 1 else path))
        yield _Tensor(
            name=_WRAPPERS.sub("", name),
            shape=tuple(entry.get("size")),
            chunks=tuple(chunks[offsets] for offsets in sorted(chunks)),
        )


def _path_of(key: str, paths: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(paths.get(key) or (key,))


def _chunk(chunk: Any, info: Any) -> _Chunk:
    if info.get("transform_descriptors") if "transform_descriptors" in info.state else None:
        raise ValueError("its chunks are compressed or encrypted")
    return _Chunk(
        offsets=tuple(chunk.get("offsets")),
        sizes=tuple(chunk.get("sizes")),
        file_name=str(info.get("relative_path")),
        begin=int(info.get("offset")),
        num_bytes=int(info.get("length")),
    )


def _files(path: Place, tensors: Sequence[_Tensor]) -> dict[str, Place]:
    names = sorted({chunk.file_name for tensor in tensors for chunk in tensor.chunks})
    files = {name: path / inner_name(path, name) for name in names}
    for file in files.values():
        if not file.is_file():
            raise IncompleteError(
                f"{file}: missing, though {METADATA_NAME} names it; copy it from the node that wrote it"
            )
    return files


def _pieces(files: Mapping[str, Place], tensors: Sequence[_Tensor]) -> dict[_Chunk, tuple[str, Segment]]:
    """Look into every file for where the elements of its chunks begin, and of which dtype they are."""
    chunks: dict[str, list[_Chunk]] = {}
    for tensor in tensors:
        for chunk in tensor.chunks:
            chunks.setdefault(chunk.file_name, []).append(chunk)
    pieces = {}
    for name, file in files.items():
        size = num_bytes_of(file)
        with open_ranges(file) as stream:
            for chunk in sorted(chunks[name], key=lambda chunk: chunk.begin):
                if chunk.begin + chunk.num_bytes > size:
                    raise DamagedError(f"{file}: cut off: it has {size} bytes, {METADATA_NAME} names more")
                stored = load_tensor(file, stream, chunk.begin, chunk.num_bytes)
                if stored.shape != chunk.sizes:
                    raise DamagedError(f"{file}: holds {stored.shape} where {METADATA_NAME} says {chunk.sizes}")
                pieces[chunk] = (stored.dtype, stored.segment(0, stored.num_elements))
    return pieces


def _joined(path: Place, tensor: _Tensor, pieces: Mapping[_Chunk, tuple[str, Segment]]) -> SourceTensor:
    dtypes = sorted({pieces[chunk][0] for chunk in tensor.chunks}) or ["float32"]
    if len(dtypes) > 1:
        raise DamagedError(f"{path}: the chunks of {tensor.name!r} have dtypes {', '.join(dtypes)}")
    runs = sorted((run for chunk in tensor.chunks for run in _runs(tensor, chunk)), key=lambda run: run[0])
    element_bytes = DTYPES[dtypes[0]].num_bytes if dtypes[0] in DTYPES else 1
    segments, end = [], 0
    for first, chunk, begin, count in runs:
        if first != end:
            raise IncompleteError(f"{path}: {tensor.name!r} of shape {tensor.shape} lacks or doubles elements at {end}")
        segment = pieces[chunk][1]
        segments.append(replace(segment, offset_bytes=segment.offset_bytes + begin * element_bytes, num_elements=count))
        end = first + count
    if end != math.prod(tensor.shape):
        raise IncompleteError(f"{path}: {tensor.name!r} of shape {tensor.shape} has {end} elements only")
    return SourceTensor(name=tensor.name, shape=tensor.shape, dtype=dtypes[0], segments=tuple(segments))


def _runs(tensor: _Tensor, chunk: _Chunk) -> Iterator[tuple[int, _Chunk, int, int]]:
    """Yield (first element in the tensor, chunk, first element in the chunk, count) of what lies side by side."""
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    # The last axis that is cut: from it on, a run holds all of what follows.
    cut_axes = [axis for axis, size in enumerate(chunk.sizes) if size != tensor.shape[axis]]
    last = cut_axes[-1] if cut_axes else 0
    count = math.prod(chunk.sizes[last:])
    if math.prod(chunk.sizes[:last]) > _MAX_RUNS:
        raise UsageError(
            f"{tensor.name!r} of shape {tensor.shape} is cut along its columns into {math.prod(chunk.sizes[:last])} "
            "pieces; put it together with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`"
        )
    start = sum(offset * stride for offset, stride in zip(chunk.offsets, strides, strict=True))
    for number, position in enumerate(product(*(range(size) for size in chunk.sizes[:last]))):
        first = start + sum(index * stride for index, stride in zip(position, strides, strict=False))
        yield first, chunk, number * count, count
