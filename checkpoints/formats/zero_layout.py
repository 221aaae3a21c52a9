"""The place of each parameter in ZeRO stages 0 to 3.

The rank files of one tag are made into a `Source`. Written for DeepSpeed 0.19.8, whose layouts the tests generate. Each
layout checks itself: the elements that its parameters take must be the elements that the files hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...errors import DamagedError, IncompleteError, UsageError
from ...files import digest_of
from ...remote import Place
from .tensors import DTYPES, Role, Source, SourceTensor, cut
from .unpickler import StoredTensor
from .zero_files import SINGLE_MODEL, Rank, read_models, read_ranks
from .zero_state import State

_Shape = tuple[int, ...]


def read_zero(tag_dir: Place) -> Source:
    """Read where every tensor of the checkpoint in *tag_dir* lies.

    Check that all of it is there.

    Raises:
        UsageError: a layout that is not converted here; the message names the way out.
        IncompleteError: a rank's file is missing.
        DamagedError: files that do not fit together or are cut off.
    """
    ranks = read_ranks(tag_dir)
    if not ranks:
        return _read_unpartitioned(tag_dir)
    zero_stage = ranks[0].zero_stage
    models = read_models(tag_dir, zero_stage, len(ranks))
    _check_masters(models[0], ranks)
    if zero_stage == 3:
        tensors = [*frozen_in_pieces(models), *_trained_in_pieces(models[0], ranks)]
    else:
        tensors = _trained_in_stream(models[0], ranks)
    unlisted = unlisted_of(models[0], tensors)
    source = replace(
        source_of(models[0], [*buffers_of(models[0]), *unlisted, *tensors], zero_stage, len(ranks)),
        digest=digest_of([*(rank.digest for rank in ranks), *(model.digest for model in models)]),
    )
    stored = {tensor.name for tensor in source.tensors}
    shared = models[0].names("shared_params")
    return replace(source, aliases=tuple((name, kept) for name, kept in shared.items() if kept in stored))


def source_of(model: State, tensors: Sequence[SourceTensor], zero_stage: int | None, world_size: int) -> Source:
    """Return what *model* says of itself, with its *tensors*."""
    tag_dir = model.path.parent
    return Source(
        path=tag_dir,
        content="model",
        tensors=tuple(tensors),
        tag=tag_dir.name,
        step=model.integer("global_steps") if model.has("global_steps") else None,
        zero_stage=zero_stage,
        world_size=world_size,
        ds_version=str(model.values.get("ds_version", "")),
        digest=model.digest,
        kind="DeepSpeed checkpoint",
    )


def _read_unpartitioned(tag_dir: Place) -> Source:
    """Read stage 0.

    The module is the model, and tied weights are two names of one place in the file.
    """
    if not (tag_dir / SINGLE_MODEL).is_file():
        raise IncompleteError(f"{tag_dir}: holds neither optim_states of any rank nor {SINGLE_MODEL}")
    model = read_models(tag_dir, 0, 1)[0]
    if model.values.get("param_shapes") is not None:
        raise IncompleteError(f"{tag_dir}: its optim_states, which hold the fp32 master weights, are missing")
    buffers = buffers_of(model)
    tensors, aliases = buffers, []
    is_buffer = {tensor.name for tensor in buffers}
    first_names: dict[tuple[str, int, _Shape], str] = {}
    for name, stored in model.below("module").tensors().items():
        if name in is_buffer:
            continue
        kept = (
            first_names.setdefault((stored.key, stored.first_byte, stored.shape), name) if stored.num_elements else name
        )
        if kept == name:
            tensors.append(whole(name, stored, "unknown"))
        else:
            aliases.append((name, kept))
    world_size = model.integer("dp_world_size") if model.has("dp_world_size") else 1
    return replace(source_of(model, tensors, 0, world_size), aliases=tuple(aliases))


def _check_masters(model: State, ranks: Sequence[Rank]) -> None:
    num_groups = len(model.shape_groups("param_shapes"))
    for rank in ranks:
        if len(rank.masters) != num_groups:
            raise DamagedError(f"{rank.path}: holds {len(rank.masters)} groups, {model.path.name} names {num_groups}")
    if num_groups and not any(master.num_elements for rank in ranks for master in rank.masters):
        raise UsageError(
            f"{ranks[0].path}: its master weights are empty, because they were swapped to NVMe; merge them with "
            "DeepSpeed's ds_to_universal.py, or save with the optimizer offloaded to the CPU"
        )


def _trained_in_pieces(model: State, ranks: Sequence[Rank]) -> list[SourceTensor]:
    """Return the trained parameters of stage 3.

    Each rank holds the same slice of every parameter; the tail of the last ones is padding.
    """
    tensors = []
    for group, shapes in enumerate(model.shape_groups("param_shapes")):
        offset = 0
        masters = [rank.masters[group] for rank in ranks]
        for name, shape in shapes.items():
            tensors.append(_joined(name, shape, masters, offset, "trained"))
            offset += math.ceil(math.prod(shape) / len(ranks))
        for rank, master in zip(ranks, masters, strict=True):
            if master.num_elements != offset:
                raise DamagedError(
                    f"{rank.path}: group {group} holds {master.num_elements} elements, its parameters take {offset}"
                )
    return tensors


def frozen_in_pieces(models: Sequence[State]) -> list[SourceTensor]:
    """Return the frozen parameters of stage 3.

    They are cut like trained ones, into the model files of all ranks.
    """
    if not models[0].values.get("frozen_param_fragments"):
        return []
    fragments = [model.below("frozen_param_fragments") for model in models]
    shapes = models[0].below("frozen_param_shapes").shapes()
    return [
        _joined(name, shape, [fragment.tensor(name) for fragment in fragments], 0, "frozen")
        for name, shape in shapes.items()
    ]


def _joined(name: str, shape: _Shape, pieces: Sequence[StoredTensor], offset: int, role: Role) -> SourceTensor:
    num_elements = math.prod(shape)
    part = math.ceil(num_elements / len(pieces))
    segments = tuple(
        piece.segment(offset, min(part, num_elements - rank * part))
        for rank, piece in enumerate(pieces)
        if rank * part < num_elements
    )
    return SourceTensor(name=name, shape=shape, dtype=_one_dtype(pieces), segments=segments, role=role)


def _trained_in_stream(model: State, ranks: Sequence[Rank]) -> list[SourceTensor]:
    """Return the trained parameters of stages 1 and 2.

    The ranks' partitions of a group, end to end, are its parameters end to end.
    """
    module = model.below("module").tensors()
    tensors = []
    for group, shapes in enumerate(model.shape_groups("param_shapes")):
        masters = [rank.masters[group] for rank in ranks]
        stream = [master.segment(0, master.num_elements) for master in masters]
        gaps = ranks[0].gaps[group] if ranks[0].gaps else (0,) * len(shapes)
        if len(gaps) != len(shapes):
            raise DamagedError(f"{ranks[0].path}: group {group} has {len(gaps)} paddings for {len(shapes)} parameters")
        dtype = _one_dtype(masters)
        offset = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            segments = tuple(cut(stream, DTYPES[dtype].num_bytes, offset, math.prod(shape)))
            copy = whole(name, module[name], "trained") if name in module else None
            if copy is not None and copy.shape != shape:
                raise DamagedError(f"{model.path}: {name!r} has shape {copy.shape}, param_shapes says {shape}")
            tensors.append(
                SourceTensor(name=name, shape=shape, dtype=dtype, segments=segments, role="trained", working_copy=copy)
            )
            offset += math.prod(shape) + gap
        _check_consumed(ranks, group, offset, sum(master.num_elements for master in masters))
    return tensors


def _check_consumed(ranks: Sequence[Rank], group: int, taken: int, held: int) -> None:
    # Groups are aligned to twice the number of ranks, and the padding is sometimes stripped.
    align = 2 * len(ranks)
    if math.ceil(taken / align) != math.ceil(held / align):
        raise DamagedError(
            f"{ranks[0].path}: group {group} of all ranks holds {held} elements, its parameters take {taken}"
        )


def unlisted_of(model: State, listed: Sequence[SourceTensor]) -> list[SourceTensor]:
    """Return what the module alone holds.

    That is frozen parameters at stages 1 and 2, extra state at any. DeepSpeed's own scripts drop the frozen parameters
    of stage 1. At stage 3 the module holds an empty placeholder for each parameter, so one that nothing lists is lost.
    """
    known = {tensor.name for tensor in listed} | _buffer_names(model) | set(model.names("shared_params"))
    unlisted = {name: stored for name, stored in model.below("module").tensors().items() if name not in known}
    lost = [name for name, stored in unlisted.items() if stored.shape == (0,)]
    if lost:
        raise DamagedError(f"{model.path}: {len(lost)} of its tensors are stored nowhere: {', '.join(lost[:5])}")
    return [whole(name, stored, "frozen") for name, stored in unlisted.items()]


def buffers_of(model: State) -> list[SourceTensor]:
    """Return the model's persistent buffers."""
    names = _buffer_names(model)
    module = model.below("module").tensors()
    return [whole(name, stored, "buffer") for name, stored in module.items() if name in names]


def _buffer_names(model: State) -> set[str]:
    return set(map(str, model.items_of("buffer_names"))) if model.has("buffer_names") else set()


def whole(name: str, stored: StoredTensor, role: Role) -> SourceTensor:
    """Return a tensor that lies in one piece."""
    segments = (stored.segment(0, stored.num_elements),) if stored.num_elements else ()
    return SourceTensor(name=name, shape=stored.shape, dtype=stored.dtype, segments=segments, role=role)


def _one_dtype(pieces: Sequence[StoredTensor]) -> str:
    dtypes = sorted({piece.dtype for piece in pieces})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        raise DamagedError(f"{pieces[0].path}: the ranks hold master weights of dtype {', '.join(dtypes)}")
    return dtypes[0]
