"""Folders of torch's distributed checkpoints (FSDP), read in place.

They have `.metadata` and `*.distcp`, or safetensors. torch's own reader unpickles `.metadata` with the plain pickle
module, which runs what a hostile file says, and takes whole tensors into memory. The layout is simple: each chunk of a
tensor is one small `torch.save` zip.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import IO, Any

from ...errors import DamagedError, IncompleteError, UsageError
from ...files import digest_of
from ...remote import Place, check_inner_name, list_folder, open_ranges, read_size, read_stamp
from .parts import model_paths
from .safetensors_file import read_file, read_tensors
from .tensors import DTYPES, Source, SourceTensor
from .torch_zip import load_tensor
from .unpickler import RefusedGlobal, Unpickler

METADATA_NAME = ".metadata"
_SHARD = re.compile(r"shard-(\d+)-model-\d+-of-\d+\.safetensors")
_MODULE = "torch.distributed.checkpoint"
_ENUM = f"{_MODULE}.metadata._MEM_FORMAT_ENCODING"
# A tensor cut along its columns has a run per row and column of chunks; each run is one read.
_MAX_RUNS = 200_000


class _Plain:
    """Stands for a dataclass of torch's metadata.

    It takes the attributes and runs nothing.
    """

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"{name!r} is missing")
        return state[name]


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """One box of the tensor *key*, and which part of which file holds it."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file_name: str
    begin: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """The entry of `.metadata` for one tensor of the model."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


def find_distcp_dir(path: Place) -> Place | None:
    """Return the folder with the model's `.metadata`.

    It is *path* itself, or what accelerate makes in it.
    """
    places = (path, path / "pytorch_model_fsdp_0")
    return next((folder for folder in places if (folder / METADATA_NAME).is_file()), None)


def read_distcp(path: Place) -> Source:
    """Read where every tensor of the model in *path* lies.

    What belongs to the optimizer is left out.

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
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
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
        digest=digest_of([content.hex(), *(f"{name} {read_stamp(file)}" for name, file in files.items())]),
    )


def _known() -> dict[str, object]:
    """Return stand-ins for torch's classes, new ones for each file.

    A pickle can set attributes of what it names.
    """
    names = "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata StorageMeta TensorProperties"
    full = [f"{_MODULE}.metadata.{name}" for name in (*names.split(), "MetadataIndex")] + [_ENUM]
    full.append(f"{_MODULE}.filesystem._StorageInfo")
    found: dict[str, object] = {name: type("Plain", (_Plain,), {"__init__": lambda self, *_: None}) for name in full}
    return found | {"builtins.getattr": _Members(found[_ENUM]).member}


class _Members:
    """Members of torch's enum.

    Python before 3.11.4, such as Debian 12's, pickles them as `getattr(enum, name)`.
    """

    def __init__(self, enum: Any) -> None:
        self._enum = enum

    def member(self, of: Any, _: str) -> Any:
        """Return what stands for a member; anything else is not asked for its attributes."""
        if of is not self._enum:
            raise RefusedGlobal("builtins.getattr")
        return self._enum()


def _tensors(root: Any) -> Iterator[_Tensor]:
    described: Mapping[str, Any] = root.get("state_dict_metadata")
    paths: Mapping[str, Any] = root.get("planner_data") or {}
    places: dict[tuple[str, tuple[int, ...] | None], Any] = {
        (index.get("fqn"), index.state.get("offset")): info for index, info in root.get("storage_data").items()
    }
    keys = {_path_of(key, paths): key for key, entry in described.items() if "chunks" in getattr(entry, "state", {})}
    for path, name in model_paths(keys).items():
        key, entry = keys[path], described[keys[path]]
        chunks = {
            tuple(chunk.get("offsets")): _chunk(
                key, chunk, places.get((key, tuple(chunk.get("offsets")))) or places[key, None]
            )
            for chunk in entry.get("chunks")
            if math.prod(chunk.get("sizes"))
        }
        shape = tuple(entry.get("size"))
        yield _Tensor(name=name, shape=shape, chunks=tuple(chunks[offsets] for offsets in sorted(chunks)))


def _path_of(key: str, paths: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, paths.get(key) or (key,)))


def _chunk(key: str, chunk: Any, info: Any) -> _Chunk:
    if info.get("transform_descriptors") if "transform_descriptors" in info.state else None:
        raise ValueError("its chunks are compressed or encrypted")
    return _Chunk(
        key=key,
        offsets=tuple(chunk.get("offsets")),
        sizes=tuple(chunk.get("sizes")),
        file_name=str(info.get("relative_path")),
        begin=int(info.get("offset")),
        num_bytes=int(info.get("length")),
    )


def _files(path: Place, tensors: Sequence[_Tensor]) -> dict[str, Place]:
    names = sorted({chunk.file_name for tensor in tensors for chunk in tensor.chunks})
    files = {name: path / check_inner_name(path, name) for name in names}
    for file in files.values():
        if not file.is_file():
            raise IncompleteError(
                f"{file}: missing, though {METADATA_NAME} names it; copy it from the node that wrote it"
            )
    return files


def _pieces(files: Mapping[str, Place], tensors: Sequence[_Tensor]) -> dict[_Chunk, SourceTensor]:
    """Look into every file for the elements of its chunks.

    Find where they begin, and of which dtype they are.
    """
    chunks: dict[str, list[_Chunk]] = {}
    for tensor in tensors:
        for chunk in tensor.chunks:
            chunks.setdefault(chunk.file_name, []).append(chunk)
    pieces = {}
    for name, file in files.items():
        size = read_size(file)
        headers: dict[int, dict[str, SourceTensor]] = {}
        with open_ranges(file) as stream:
            for chunk in sorted(chunks[name], key=lambda chunk: chunk.begin):
                if chunk.begin + chunk.num_bytes > size:
                    raise DamagedError(f"{file}: cut off: it has {size} bytes, {METADATA_NAME} names more")
                stored = _stored(file, stream, chunk, headers)
                if stored.shape != chunk.sizes:
                    raise DamagedError(f"{file}: holds {stored.shape} where {METADATA_NAME} says {chunk.sizes}")
                pieces[chunk] = stored
    return pieces


def _stored(file: Place, stream: IO[bytes], chunk: _Chunk, headers: dict[int, dict[str, SourceTensor]]) -> SourceTensor:
    """Return one chunk.

    It is a zip of its own, or a tensor of the safetensors that the rank wrote.
    """
    stream.seek(chunk.begin)
    if chunk.begin in headers or stream.read(2) != b"PK":
        if chunk.begin not in headers:
            headers[chunk.begin] = {tensor.name: tensor for tensor in read_tensors(file, chunk.begin)}
        if chunk.key not in headers[chunk.begin]:
            raise DamagedError(f"{file}: does not hold {chunk.key!r}, which {METADATA_NAME} says is there")
        return headers[chunk.begin][chunk.key]
    stored = load_tensor(file, stream, chunk.begin, chunk.num_bytes)
    segments = (stored.segment(0, stored.num_elements),)
    return SourceTensor(name=chunk.key, shape=stored.shape, dtype=stored.dtype, segments=segments)


def is_hf_sharded(path: Place) -> bool:
    """Say whether *path* holds what each rank wrote of a model.

    The writer is torch's HuggingFaceStorageWriter.
    """
    return any(_SHARD.fullmatch(file.name) for file in path.iterdir())


def read_hf_shards(path: Place) -> Source:
    """Read where every tensor lies in safetensors that each rank wrote.

    torch has not consolidated them.

    Raises:
        IncompleteError: a rank's file is missing, as far as their numbers and the tensors' gaps show.
        DamagedError: a file is cut off, or does not say which part of its tensors it holds.
    """
    files = {file.name: file for file in list_folder(path) if _SHARD.fullmatch(file.name)}
    numbers = {int(_SHARD.fullmatch(name)[1]) for name in files}  # type: ignore[index]
    missing = sorted(set(range(1, max(numbers))) - numbers)
    if missing:
        raise IncompleteError(f"{path}: has no shard-{missing[0]:05d}-*; copy it from the node that wrote it")
    pieces: dict[_Chunk, SourceTensor] = {}
    for file in files.values():
        tensors, metadata = read_file(file)
        try:
            offsets = {
                name: tuple(map(int, info["saved_offsets"]))
                for name, info in json.loads(metadata["DCP_SHARDING_INFO"]).items()
            }
            for stored in tensors:
                chunk = _Chunk(
                    key=stored.name,
                    offsets=offsets[stored.name],
                    sizes=stored.shape,
                    file_name=file.name,
                    begin=0,
                    num_bytes=0,
                )
                pieces[chunk] = stored
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedError(f"{file}: does not say which part of its tensors it holds ({error})") from error
    chunks: dict[str, list[_Chunk]] = {}
    for chunk in pieces:
        chunks.setdefault(chunk.key, []).append(chunk)
    whole = [_Tensor(name=name, shape=_around(boxes), chunks=tuple(boxes)) for name, boxes in chunks.items()]
    return Source(
        path=path,
        content="model",
        kind="torch distributed checkpoint in safetensors",
        world_size=len(numbers),
        tensors=tuple(_joined(path, tensor, pieces) for tensor in whole),
        digest=digest_of([f"{name} {read_stamp(file)}" for name, file in files.items()]),
    )


def _around(chunks: Sequence[_Chunk]) -> tuple[int, ...]:
    """Return the shape that boxes make together."""
    ends = [[offset + size for offset, size in zip(box.offsets, box.sizes, strict=True)] for box in chunks]
    return tuple(map(max, zip(*ends, strict=True)))


def _joined(path: Place, tensor: _Tensor, pieces: Mapping[_Chunk, SourceTensor]) -> SourceTensor:
    dtypes = sorted({pieces[chunk].dtype for chunk in tensor.chunks}) or ["float32"]
    if len(dtypes) > 1:
        raise DamagedError(f"{path}: the chunks of {tensor.name!r} have dtypes {', '.join(dtypes)}")
    runs = sorted((run for chunk in tensor.chunks for run in _runs(tensor, chunk)), key=lambda run: run[0])
    element_bytes = DTYPES[dtypes[0]].num_bytes if dtypes[0] in DTYPES else 1
    segments, end = [], 0
    for first, chunk, begin, count in runs:
        if first != end:
            raise IncompleteError(f"{path}: {tensor.name!r} of shape {tensor.shape} lacks or doubles elements at {end}")
        segment = pieces[chunk].segments[0]
        segments.append(replace(segment, offset_bytes=segment.offset_bytes + begin * element_bytes, num_elements=count))
        end = first + count
    if end != math.prod(tensor.shape):
        raise IncompleteError(f"{path}: {tensor.name!r} of shape {tensor.shape} has {end} elements only")
    return SourceTensor(name=tensor.name, shape=tensor.shape, dtype=dtypes[0], segments=tuple(segments))


def _runs(tensor: _Tensor, chunk: _Chunk) -> Iterator[tuple[int, _Chunk, int, int]]:
    """Yield runs of elements that lie side by side.

    A run is (first element in the tensor, chunk, first element in the chunk, count).
    """
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
