"""Find the tensors of a model that was saved as `pytorch_model.bin`.

It may be in several files. Nothing that the pickles say is run. Files of torch before 1.6, which are no zip, are read
too: many models on the hub are that old.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from ...errors import DamagedError, IncompleteError
from ...remote import Place, check_inner_name, open_ranges, read_size
from .tensors import DTYPES
from .torch_zip import is_zip, load_state, naming
from .unpickler import StoredTensor, Unpickler

PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Constants of the attention that models make themselves; transformers before 4.31 wrote them beside the weights.
_CONSTANTS = re.compile(r"(^|\.)((attn|attention)\.(masked_bias|bias)|rotary_emb\.inv_freq|embeddings\.position_ids)$")


def pickled_files(folder: Place) -> list[Place]:
    """Return the pickled weight files of *folder*, if any.

    Raises:
        DamagedError: the index is none, or names a place outside the folder.
        IncompleteError: a file that the index names is missing.
    """
    index = folder / PICKLED_INDEX_NAME
    if not index.is_file():
        return [folder / PICKLED_NAME] if (folder / PICKLED_NAME).is_file() else []
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        found: list[Place] = [folder / check_inner_name(index, name) for name in named]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{index}: not an index of weight files ({error})") from error
    for file in found:
        if not file.is_file():
            raise IncompleteError(f"{file}: missing, though {PICKLED_INDEX_NAME} names it")
    return found


def read_pickled(files: list[Place], *, is_tied: bool = True, has_code: bool = False) -> dict[str, StoredTensor]:
    """Return the tensors of a model by name, each of them once.

    Of tensors that are one and the same the first is taken where *is_tied*: transformers ties the others to it.
    Constants that models of transformers make themselves are left out, unless the model *has_code* of its own.

    Raises:
        DamagedError: a file is cut off, is no model, or says more than its bytes can hold.
        UsageError: a file holds a kind of tensor that is not read here.
    """
    found: dict[str, StoredTensor] = {}
    places: set[tuple[Place, str, int, tuple[int, ...]]] = set()
    for file in files:
        num_bytes = 0
        for name, tensor in _named_tensors(file):
            if name in found:
                raise DamagedError(f"{file}: holds {name!r}, which another file of the model holds too")
            place = (file, tensor.key, tensor.first_byte, tensor.shape)
            is_copy = place in places
            places.add(place)
            if (_is_constant(name, tensor) and not has_code) or (is_copy and is_tied):
                continue
            num_bytes += 0 if is_copy else tensor.num_elements * DTYPES[tensor.dtype].num_bytes
            found[name] = tensor
        if num_bytes > read_size(file):
            raise DamagedError(f"{file}: its tensors would be {num_bytes:,} bytes, more than it has: they overlap")
    return found


def _is_constant(name: str, tensor: StoredTensor) -> bool:
    if not _CONSTANTS.search(name):
        return False
    # a bias of weights has one dimension
    return not name.endswith(".bias") or len(tensor.shape) == 4


def _named_tensors(file: Place) -> Iterator[tuple[str, StoredTensor]]:
    state = load_state(file)[0] if is_zip(file) else _load_old(file)
    state = cast(Mapping[str, object], state.get("state_dict", state))
    if not isinstance(state, dict):
        raise DamagedError(f"{file}: holds {type(state).__name__}, not the weights of a model")
    for name, tensor in state.items():
        if isinstance(tensor, StoredTensor) and isinstance(name, str) and tensor.dtype in DTYPES:
            yield name, tensor
        elif not str(name).startswith("_"):
            what = f"a tensor of {tensor.dtype}" if isinstance(tensor, StoredTensor) else f"a {type(tensor).__name__}"
            raise DamagedError(f"{file}: {name!r} is {what}, not a tensor of weights; save the model's state_dict")


@dataclass(kw_only=True)
class _Old:
    """The storages of a file from before torch 1.6.

    They lie one behind the other after the pickles.
    """

    path: Place
    offsets: dict[str, int]
    sizes: dict[str, int]

    def size_of(self, key: str) -> int:
        return self.sizes[key]

    def offset_of(self, key: str) -> int:
        return self.offsets[key]

    def crc_of(self, key: str) -> int:
        raise DamagedError(f"{self.path}: has no checksums")


class _OldUnpickler(Unpickler):
    """Reads the structure of an old file, whose sizes come after it."""

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the class of a whole module, with its source
            return pid[1]
        kind, storage_type, key, location, num_elements, view = pid
        if view is not None:
            raise ValueError(f"storage {key} is a part of another")
        records = cast(_Old, self._records)
        dtype = self.dtype_of(storage_type)
        records.sizes[str(key)] = num_elements * (DTYPES[dtype].num_bytes if dtype in DTYPES else 1)
        return super().persistent_load((kind, storage_type, key, location, num_elements))


def _load_old(file: Place) -> Mapping[str, object]:
    records = _Old(path=file, offsets={}, sizes={})
    with open_ranges(file) as stream, naming(file):
        if (Unpickler(stream, None).load(), Unpickler(stream, None).load()) != (_MAGIC, _PROTOCOL):
            raise ValueError("it does not begin as torch's files do")
        about = Unpickler(stream, None).load()
        if not isinstance(about, dict) or about.get("little_endian") is not True:
            raise ValueError("it was written on a big-endian machine")
        state = _OldUnpickler(stream, records).load()
        keys = Unpickler(stream, None).load()
        if not isinstance(state, dict):
            raise ValueError(f"it holds {type(state).__name__}, not the weights of a model")
        _place_storages(stream, keys, records, read_size(file))
    return state


def _place_storages(stream: IO[bytes], keys: Any, records: _Old, size: int) -> None:
    if sorted(keys) != sorted(records.sizes):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        num_elements = int.from_bytes(stream.read(8), "little")
        begin, num_bytes = stream.tell(), records.sizes[key]
        if begin + num_bytes > size:
            raise EOFError(f"it has {size} bytes, {begin + num_bytes} are needed")
        if num_bytes % max(1, num_elements) or (num_bytes > 0) != (num_elements > 0):
            raise ValueError(f"storage {key} has {num_elements} elements in {num_bytes} bytes")
        records.offsets[key] = begin
        stream.seek(begin + num_bytes)
