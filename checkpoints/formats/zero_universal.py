"""Universal checkpoints, which DeepSpeed's ds_to_universal.py makes.

They have a folder per parameter, `zero/<name>/fp32.pt`. Also the way out for tensor parallelism: ds_to_universal merges
its slices.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import DamagedError, IncompleteError
from ...files import digest_of
from ...remote import Place, list_folder, map_in_threads
from .tensors import Source, SourceTensor
from .torch_zip import Archive, load_any
from .unpickler import StoredTensor
from .zero_files import is_model_file
from .zero_layout import buffers_of, frozen_in_pieces, source_of, unlisted_of, whole
from .zero_state import State

_MASTER = "fp32.pt"


def is_universal(path: Place) -> bool:
    """Say whether *path* is the folder that ds_to_universal.py made."""
    return (path / "zero").is_dir() and any(is_model_file(file.name) for file in path.iterdir())


def read_universal(path: Place) -> Source:
    """Read where every parameter lies.

    Buffers and frozen parameters are in the model files beside.

    Raises:
        DamagedError: a file is cut off, or its size is not that of the parameter.
        IncompleteError: a parameter has no folder.
    """
    models = [State.load(file) for file in list_folder(path) if is_model_file(file.name)]
    shapes = {
        name: shape for model in models for group in model.shape_groups("param_shapes") for name, shape in group.items()
    }
    folders = {folder.name: folder for folder in (path / "zero").iterdir()}
    missing = [name for name in shapes if name not in folders]
    if missing:
        raise IncompleteError(f"{path / 'zero'}: has no folder of {len(missing)} parameters: {', '.join(missing[:5])}")
    read = map_in_threads(lambda name: _master(folders[name] / _MASTER), shapes)
    tensors, digests = [], []
    for (name, shape), (stored, archive) in zip(shapes.items(), read, strict=True):
        tensors.append(_shaped(name, stored, shape))
        digests.append(archive.digest())
    listed = [*frozen_in_pieces(models), *tensors]
    source = source_of(models[0], [*buffers_of(models[0]), *unlisted_of(models[0], listed), *listed], None, 1)
    shared = models[0].names("shared_params")
    stored_names = {tensor.name for tensor in source.tensors}
    return replace(
        source,
        kind="DeepSpeed universal checkpoint",
        digest=digest_of([*(model.digest for model in models), *digests]),
        aliases=tuple((name, kept) for name, kept in shared.items() if kept in stored_names),
    )


def _master(path: Place) -> tuple[StoredTensor, Archive]:
    """Return the tensor of one file.

    It is alone (from stage 3) or the `param` of a mapping (from stages 1 and 2).
    """
    found, archive = load_any(path)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, StoredTensor):
        raise DamagedError(f"{path}: holds no tensor of a parameter")
    return tensor, archive


def _shaped(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> SourceTensor:
    """Give a master the shape of its parameter.

    Stage 3 leaves the tensors flat. A vocabulary is padded only by Megatron, whose names are not loaded here.
    """
    tensor = whole(name, stored, "trained")
    if stored.shape != shape and stored.shape != (tensor.num_elements,):
        return tensor  # merged from tensor-parallel slices: larger than the shape that one rank knew
    if replace(tensor, shape=shape).num_elements != tensor.num_elements:
        raise DamagedError(f"{stored.path}: holds {tensor.num_elements} elements for {name!r} of shape {shape}")
    return replace(tensor, shape=shape)
