"""Convert models that are not safetensors, once, into the user's cache.

`pytorch_model.bin` is streamed, byte for byte, without running what its pickle says. A GGUF file is dequantised by
transformers, in a process of its own.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ... import files
from ...checkpoints.capacity.allocation import allocate
from ...checkpoints.formats.pickled_model import pickled_files, read_pickled
from ...checkpoints.formats.safetensors_file import INDEX_NAME, PlacedTensor, index_text, plan_shards
from ...checkpoints.formats.tensors import DTYPES, Segment, SourceTensor
from ...checkpoints.formats.unpickler import StoredTensor
from ...errors import SousbatchError, UsageError
from ...remote import map_in_threads
from .cache import file_digest, weights_digest
from .model_cache import made_once
from .tokenizer import TOKENIZER_KINDS

logger = logging.getLogger(__name__)

# What a model folder has beside its weights; the .bin index names files that the converted folder has not.
BESIDE = (*TOKENIZER_KINDS, "*.py")
_RECORD_NAME = "conversion.json"
_FORMAT = 1  # raised when the same source is converted in another way
_BLOCK_BYTES = 4 << 20
_SHARD_BYTES = 5_000_000_000


def converted(key: str, name: str, folder: Path) -> Path:
    """Return *folder*, or the cache's folder of the same model as safetensors.

    Models that have safetensors already, or no weights, are returned as they are. *folder* may be a GGUF file.

    Raises:
        UsageError: the weights cannot be read, or the cache has no space for them.
    """
    if folder.suffix.lower() == ".gguf" and folder.is_file():
        return _from_gguf(f"{key} {name!r}", folder)
    if any(folder.glob("*.safetensors")):
        return folder
    try:
        pickled = [file for file in pickled_files(folder) if isinstance(file, Path)]
        if pickled:
            return _from_pickled(f"{key} {name!r}", folder, pickled)
    except SousbatchError as error:
        what = f"{key} {name!r}"
        raise UsageError(str(error) if what in str(error) else f"{what} cannot be used: {error}") from error
    quantised = sorted(folder.glob("*.gguf"))
    if len(quantised) > 1:
        raise UsageError(
            f"{key} {name!r} has {len(quantised)} GGUF files; name one: {', '.join(map(str, quantised[:5]))}"
        )
    return _from_gguf(f"{key} {name!r}", quantised[0]) if quantised else folder


def weights_identity(folder: Path) -> list[tuple[str, str]]:
    """Return the names and digests of a model's weights.

    Where they were converted, these are of their source.
    """
    with suppress(FileNotFoundError, ValueError, LookupError):
        return [(str(name), str(digest)) for name, digest in files.read_json(folder / _RECORD_NAME)["source"]]
    weights = sorted(folder.glob("*.safetensors"))
    return list(zip((path.name for path in weights), map_in_threads(weights_digest, weights), strict=True))


def beside_weights(folder: Path) -> list[Path]:
    """Return the small files of a model folder: config, tokenizer, code."""
    found = {path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json") and path.name != _RECORD_NAME)


def _from_pickled(what: str, folder: Path, pickled: list[Path]) -> Path:
    beside = beside_weights(folder)
    source = [(path.name, weights_digest(path)) for path in pickled]
    config = _config(folder)
    is_tied = config.get("tie_word_embeddings") is not False
    has_code = bool(config.get("auto_map"))
    tensors = read_pickled(list(pickled), is_tied=is_tied, has_code=has_code)
    num_bytes = sum(tensor.num_elements * DTYPES[tensor.dtype].num_bytes for tensor in tensors.values())
    identity = files.digest_of([_FORMAT, source, [(path.name, file_digest(path)) for path in beside]])

    def make(target: Path) -> None:
        logger.warning("%s holds %s: written as safetensors to the cache, once", what, pickled[0].name)
        for path in beside:
            shutil.copyfile(path, target / path.name)
        write_tensors(tensors, target)
        files.write_json(target / _RECORD_NAME, {"format": _FORMAT, "source": source})

    return made_once(what, f"{_stem(folder)}-{identity[:16]}", num_bytes + (1 << 20), make)


def _config(folder: Path) -> Mapping[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        return dict(files.read_json(folder / "config.json"))
    return {}


def _stem(path: Path) -> str:
    """Return a name for a folder of the cache that says what was converted."""
    named = path.parent.parent if path.parent.name == "snapshots" else path
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in named.stem.lstrip("."))[:60]


def write_tensors(tensors: Mapping[str, StoredTensor], target: Path) -> None:
    """Write the tensors of torch's files to *target* as safetensors.

    Each byte stays as it is. Memory is one block. A tensor that lies in its file in another order, as a transposed one
    does, is mapped.
    """
    placed = [
        SourceTensor(name=name, shape=tensor.shape, dtype=tensor.dtype, segments=(_whole(tensor),))
        for name, tensor in tensors.items()
    ]
    shards = plan_shards(placed, dtype=None, max_shard_bytes=_SHARD_BYTES)
    for shard in shards:
        with (target / shard.file_name).open("wb", buffering=0) as stream:
            allocate(stream.fileno(), shard.num_bytes)
            stream.write(shard.header)
            for one in shard.tensors:
                _write(one, tensors[one.source.name], stream)
    if len(shards) > 1:
        files.write_text(target / INDEX_NAME, index_text(shards))


def _whole(tensor: StoredTensor) -> Segment:
    """Return the place of a tensor.

    Where it is not in row-major order, only its first byte has a meaning.
    """
    begin = tensor.records.offset_of(tensor.key) + tensor.first_byte
    return Segment(path=tensor.path, offset_bytes=begin, num_elements=tensor.num_elements)


def _write(placed: PlacedTensor, tensor: StoredTensor, stream: IO[bytes]) -> None:
    (segment,), path = placed.source.segments, tensor.path
    assert isinstance(path, Path)  # what is remote was fetched first
    blocks = _blocks if tensor.is_contiguous else _strided_blocks
    for block in blocks(path, segment.offset_bytes, placed, tensor):
        while block:
            block = block[os.write(stream.fileno(), block) :]


def _blocks(path: Path, begin: int, placed: PlacedTensor, _: StoredTensor) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, placed.num_bytes)))
    with path.open("rb", buffering=0) as stream:
        left = placed.num_bytes
        stream.seek(begin)
        while left:
            num_read = stream.readinto(buffer[:left])
            if not num_read:
                raise UsageError(f"{path}: became shorter while it was read")
            yield buffer[:num_read]
            left -= num_read


def _strided_blocks(path: Path, begin: int, placed: PlacedTensor, tensor: StoredTensor) -> Iterator[memoryview]:
    import numpy as np

    size = placed.dtype.num_bytes
    span = 1 + sum((num - 1) * step for num, step in zip(tensor.shape, tensor.stride, strict=True))
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=begin, shape=(span * size,))
    steps = [step * size for step in tensor.stride]
    whole = np.lib.stride_tricks.as_strided(mapped.view(f"V{size}"), shape=tensor.shape, strides=steps)
    rows = max(1, _BLOCK_BYTES * tensor.shape[0] // max(1, placed.num_bytes))
    for first in range(0, tensor.shape[0], rows):
        yield np.ascontiguousarray(whole[first : first + rows]).reshape(-1).view(np.uint8).data


def _from_gguf(what: str, file: Path) -> Path:
    source = [(file.name, weights_digest(file))]
    identity = files.digest_of([_FORMAT, source[0][1]])

    def make(target: Path) -> None:
        logger.warning("%s is dequantised to the cache, once", what)
        _run_gguf(what, file, target)
        files.write_json(target / _RECORD_NAME, {"format": _FORMAT, "source": source})

    return made_once(what, f"{_stem(file)}-{identity[:16]}", 0, make)


def _run_gguf(what: str, file: Path, target: Path) -> None:
    command = [sys.executable, "-m", f"{__package__}.gguf", str(file), str(target)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise UsageError(f"{what} cannot be dequantised: {reason}")
