"""Consolidate an opened checkpoint into one model folder that `from_pretrained` loads, in bounded memory."""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...errors import NotFoundError, RunError, UsageError, no_room_named
from ...files import sync_dir, sync_tree, temporary_path, write_json, write_text
from .adapter import merge_adapter
from .beside import ADAPTER_CONFIG_NAME, CONFIG_NAME, last_config, records, write_beside
from .cast import Loss, cast_block
from .manifest import MANIFEST_NAME, FileRecord, Manifest, digest_of_files, to_json
from .read import open_source
from .reader import check_twins
from .source import Source
from .stream import write_shards
from .tensorfile import INDEX_NAME, Shard, index_text, plan_shards

logger = logging.getLogger(__name__)

OutputDtype = Literal["float16", "bfloat16", "float32"]
Overflow = Literal["refuse", "clamp", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """How to write, as asked for."""

    max_shard_bytes: int
    num_workers: int
    overflow: Overflow
    copied_from: tuple[Path, ...]
    count_flushed: bool
    progress: Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """The files of one pass over all tensors, and what their dtype could not keep."""

    dtype: OutputDtype
    shards: tuple[Shard, ...]
    files: tuple[FileRecord, ...]
    num_overflowing: Mapping[str, int]
    num_flushed: int | None


def consolidate(  # one keyword per choice of the caller; a dataclass would only move them
    source: Source,
    out_dir: Path,
    *,
    dtype: OutputDtype = "float16",
    max_shard_bytes: int = 5_000_000_000,
    num_workers: int = 1,
    overflow: Overflow = "refuse",
    base_dir: Path | None = None,
    copy_from: Path | None = None,
    count_flushed: bool = False,
    progress: Callable[[int, int], None] | None = None,
    before_commit: Callable[[], None] | None = None,
) -> Manifest:
    """Write *source* as the model folder *out_dir*, which appears whole or not at all.

    The weights are byte for byte those of DeepSpeed's zero_to_torch.py; `manifest.json` says
    what they are. An adapter becomes `adapter_model.safetensors`, or with *base_dir* a model:
    that base with the adapter added in fp32. Memory does not grow with the model.

    Args:
        out_dir: must be absent or empty, and not lie within the checkpoint.
        num_workers: threads that read, cast and write, each with 4 to 8 MB; the caller's hashes.
        overflow: finite values beyond *dtype*: refuse them, clamp them to its limits, or write
            the whole model in bfloat16.
        base_dir: the model folder that the adapter was trained on.
        copy_from: the folder whose config.json and tokenizer go along, the dtype set; what it
            lacks of a merged model comes from *base_dir*.
        count_flushed: also count the values that become zero; each block takes twice as long.
        progress: gets (bytes written, all bytes) after each block, in the caller's thread.
        before_commit: called when all is on disk; what it raises keeps *out_dir* from appearing.

    Raises:
        UsageError: *out_dir* is taken, or adapter and base cannot be merged here.
        RunError: NaN, infinite or overflowing values; the parameters are named.
        NoRoomError: the store is full; known before the first byte is read.
        DamagedError: the checkpoint does not fit together.
    """
    _refuse_target(source, out_dir)
    source = _configured(source, copy_from)
    if base_dir is not None:
        source = _merged(source, base_dir)
    copied_from = tuple(folder for folder in (base_dir, copy_from) if folder is not None)
    source = _untied(source, copied_from)
    check_twins(source.tensors)
    work = _Work(
        max_shard_bytes=max_shard_bytes,
        num_workers=num_workers,
        overflow=overflow,
        copied_from=copied_from,
        count_flushed=count_flushed,
        progress=progress or (lambda num_bytes, total: None),
    )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(out_dir)
    try:
        with no_room_named(str(out_dir)):
            temporary.mkdir()
            manifest = _write_folder(source, temporary, dtype, work)
        if before_commit is not None:
            before_commit()
        _commit(temporary, out_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # what went wrong is being raised
        raise
    return manifest


def _refuse_target(source: Source, out_dir: Path) -> None:
    if (out_dir / MANIFEST_NAME).exists():
        raise UsageError(f"{out_dir}: holds a consolidated model already; remove it or name another folder")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"{out_dir}: exists and is not an empty folder; name another")
    parent = source.path.parent
    checkpoint = parent if re.fullmatch(r"(checkpoint|step)-\d+", parent.name) else source.path
    if out_dir.resolve().is_relative_to(checkpoint.resolve()):
        # It would make the checkpoint the newest by date, and trainers delete the others by date.
        raise UsageError(f"{out_dir}: lies within the checkpoint {checkpoint}; name a folder outside of it")


def _configured(source: Source, copy_from: Path | None) -> Source:
    """Give an adapter its configuration: without its scaling the weights mean nothing."""
    if source.content == "model" or source.adapter_config is not None:
        return source
    config = last_config([copy_from] if copy_from is not None else [], ADAPTER_CONFIG_NAME)
    if config is None:
        raise NotFoundError(
            f"{source.path}: has no {ADAPTER_CONFIG_NAME} beside it, which holds the scaling; put it there"
        )
    return replace(source, adapter_config=config)


def _merged(source: Source, base_dir: Path) -> Source:
    if source.content != "adapter" or source.adapter_config is None:
        raise UsageError(f"{source.path}: is a whole model, not an adapter; leave out the base {base_dir}")
    return merge_adapter(source, open_source(base_dir), source.adapter_config)


def _untied(source: Source, copied_from: Sequence[Path]) -> Source:
    """Store shared weights under both names where the configuration says that loading will not tie them."""
    if not copied_from or source.content == "adapter":
        return source
    config = last_config(copied_from, CONFIG_NAME)
    if config is None:
        raise NotFoundError(f"{copied_from[-1]}: has no {CONFIG_NAME}; give the folder of the model's configuration")
    if config.get("tie_word_embeddings") is not False:
        return source
    stored = {tensor.name: tensor for tensor in source.tensors}
    copies = tuple(replace(stored[kept], name=name) for name, kept in source.aliases)
    return replace(source, tensors=source.tensors + copies, aliases=())


def _write_folder(source: Source, folder: Path, dtype: OutputDtype, work: _Work) -> Manifest:
    """Write all files into *folder* and make them durable, the manifest last."""
    weights = _write_weights(source, folder, dtype, work)
    if len(weights.shards) > 1:
        write_text(folder / INDEX_NAME, index_text(weights.shards))
    write_beside(source, work.copied_from, folder, weights.dtype)
    sync_tree(folder)
    known = {file.name for file in weights.files}
    manifest = _manifest(source, weights, weights.files + records(folder, without=known))
    write_json(folder / MANIFEST_NAME, to_json(manifest))
    return manifest


def _write_weights(source: Source, folder: Path, dtype: OutputDtype, work: _Work) -> _Weights:
    """Stream all tensors; what overflows is refused, clamped, or written once more in bfloat16."""
    is_adapter = source.content == "adapter"  # peft loads a single file only
    shards = plan_shards(
        source.tensors,
        dtype=dtype,
        max_shard_bytes=None if is_adapter else work.max_shard_bytes,
        stem="adapter_model" if is_adapter else "model",
    )
    cast = functools.partial(cast_block, clamp=work.overflow == "clamp", count_flushed=work.count_flushed)
    written = write_shards(shards, folder, num_workers=work.num_workers, cast=cast, progress=work.progress)
    _refuse_nonfinite(source, written.losses)
    overflowing = {name: loss.num_overflowing for name, loss in written.losses.items() if loss.num_overflowing}
    if overflowing and work.overflow == "bfloat16" and dtype == "float16":
        logger.warning("%s: values beyond float16 in %s; writing bfloat16", source.path, _named(overflowing))
        for shard in shards:
            (folder / shard.file_name).unlink()
        return replace(_write_weights(source, folder, "bfloat16", work), num_overflowing=overflowing)
    if overflowing and work.overflow != "clamp":
        advice = "consolidate with dtype bfloat16, or clamp them" if dtype == "float16" else "clamp them"
        raise RunError(f"{source.path}: values beyond {dtype} in {_named(overflowing)}; {advice}")
    return _Weights(
        dtype=dtype,
        shards=shards,
        files=written.files,
        num_overflowing=overflowing,
        num_flushed=sum(loss.num_flushed for loss in written.losses.values()) if work.count_flushed else None,
    )


def _refuse_nonfinite(source: Source, losses: Mapping[str, Loss]) -> None:
    nonfinite = {name: loss.num_nonfinite for name, loss in losses.items() if loss.num_nonfinite}
    if nonfinite:
        raise RunError(
            f"{source.path}: NaN or infinite values in {_named(nonfinite)}; the training had diverged by "
            f"step {source.step}, use an older checkpoint"
        )


def _named(counts: Mapping[str, int]) -> str:
    """Name the parameters with the most values first, the rest as a number."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name!r} ({count})" for name, count in ranked[:10])
    return named + (f" and {len(ranked) - 10} more tensors" if len(ranked) > 10 else "")


def _manifest(source: Source, weights: _Weights, files: tuple[FileRecord, ...]) -> Manifest:
    ordered = tuple(sorted(files, key=lambda file: file.name))
    return Manifest(
        dtype=weights.dtype,
        content=source.content,
        tag=source.tag,
        step=source.step,
        zero_stage=source.zero_stage,
        world_size=source.world_size,
        ds_version=source.ds_version,
        num_params=sum(tensor.num_elements for tensor in source.tensors),
        num_bytes=sum(file.num_bytes for file in files),
        files=ordered,
        digest=digest_of_files(ordered),
        num_overflowing=dict(weights.num_overflowing),
        num_flushed=weights.num_flushed,
    )


def _commit(temporary: Path, out_dir: Path) -> None:
    try:
        os.rename(temporary, out_dir)
    except OSError as error:
        if out_dir.exists():
            raise UsageError(f"{out_dir}: appeared meanwhile; another consolidation wrote it") from error
        raise
    sync_dir(out_dir.parent)
