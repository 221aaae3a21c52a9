"""Consolidate an opened checkpoint into one model folder.

`from_pretrained` loads the folder. Memory is bounded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import FencedError, NoRoomError, RunError, UsageError, no_room_named
from ...remote import Place
from ..formats.companion_files import CONFIG_NAME, beside, last_config
from ..formats.safetensors_file import INDEX_NAME, Shard, index_text
from ..formats.tensors import Source
from .checksums import all_of, check_records
from .manifest import MANIFEST_NAME, FileRecord, Manifest, digest_of_files, read_manifest, to_json, verify_manifest
from .model_card import CARD_NAME, card, hub_id, origin
from .options import ConsolidateOptions
from .output import Output, TakenAwayError, clear_leftovers, open_output
from .plan import ConsolidationPlan, plan_consolidation
from .reader import check_working_copies
from .stream import Settings, WrittenShard, write_shards
from .verify import verify_shards

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_DEFAULTS = ConsolidateOptions()


def consolidate(
    source: Source,
    out: Place,
    options: ConsolidateOptions = _DEFAULTS,
    *,
    part: int = 0,
    num_parts: int = 1,
    may_restart: bool = True,
    progress: Progress | None = None,
    before_commit: Callable[[], None] | None = None,
) -> Manifest | None:
    """Write every *num_parts*-th shard of *source*.

    The part that finds all shards there makes *out* appear. The weights are byte for byte those of DeepSpeed's
    zero_to_torch.py; `manifest.json` says what they are. An adapter becomes `adapter_model.safetensors`, or the model
    that it makes of its base, added in fp32. Memory does not grow with the model. What was interrupted resumes at the
    shard where it stood, as long as checkpoint and options are the same.

    Args:
        out: a folder or URL, absent or empty, not within the checkpoint. A folder appears complete
            or not at all; behind a URL the manifest appears last.
        may_restart: drop what was left unfinished of another checkpoint or with other options; else refuse.
        progress: gets (bytes written, all bytes) after each block, in the caller's thread.
        before_commit: called when all is on disk; what it raises keeps *out* from appearing.

    Returns:
        The manifest of the whole model, None while shards of other parts are missing. A model that is there
        already is compared with its manifest, by sizes, and where *options* ask to verify by digests.

    Raises:
        UsageError: *out* is taken, or adapter and base cannot be merged here.
        RunError: NaN, infinite or overflowing values; the parameters are named.
        NoRoomError: the disk is full; known before the first byte is read.
        DamagedError: the checkpoint does not fit together, or the model that is there is not what its manifest says.
    """
    if num_parts > 1 and options.overflow == "bfloat16" and options.dtype == "float16":
        raise UsageError("parts of one model cannot turn to bfloat16 alone; choose dtype bfloat16, or overflow clamp")
    work = plan_consolidation(source, options)
    done = _found(out, work, reads_all=options.is_verified)
    if done is not None:
        return done
    _refuse_target(source, out)
    check_working_copies(work.source.tensors)
    output = open_output(out, may_restart=may_restart)
    try:
        with no_room_named(str(out)):
            manifest = _written(work, output, _Share(part=part, num_parts=num_parts), progress or _silent)
            if manifest is not None:
                if before_commit is not None:
                    before_commit()
                output.commit(_encoded(to_json(manifest)))
    except (TakenAwayError, FileNotFoundError):
        done = _found(out, work, reads_all=False)
        if done is None:
            raise
        return done  # by another process, such as another task of the same array
    except BaseException as error:
        is_refused = isinstance(error, RunError) and not isinstance(error, FencedError | NoRoomError)
        output.leave(is_shared=num_parts > 1, is_refused=is_refused)
        raise
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Share:
    """The shards that this call writes: their number is *part* modulo *num_parts*."""

    part: int
    num_parts: int

    def of(self, shards: Sequence[Shard]) -> list[Shard]:
        return list(shards[self.part :: self.num_parts])


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """All shards, written, and what their dtype could not keep."""

    dtype: str
    shards: Sequence[Shard]
    written: Sequence[WrittenShard]
    num_overflowing: Mapping[str, int]


def _written(work: ConsolidationPlan, output: Output, share: _Share, progress: Progress) -> Manifest | None:
    """Write the shards of *share*.

    When all are there then, write the rest of the folder but its manifest.
    """
    plan = output.begin({"request": work.request, "dtype": work.options.dtype, "num_overflowing": {}})
    while True:
        shards = work.shards(plan["dtype"])
        if len(shards) > 1:
            output.write(INDEX_NAME, index_text(shards).encode())
        _write_missing(work, output, share.of(shards), progress)
        written = [found for found in map(output.written, shards) if found is not None]
        is_whole = len(written) == len(shards)
        if is_whole and work.options.checks_source:  # first: a flipped bit makes NaN, which is not the training's fault
            check_records(work.source.tensors, all_of(each.spans for each in written))
        overflowing = _overflowing(work, plan["dtype"], written)
        if overflowing and work.options.overflow == "bfloat16" and plan["dtype"] == "float16":
            logger.warning("%s: values beyond float16 in %s; writing bfloat16", work.source.path, _named(overflowing))
            plan = {**plan, "dtype": "bfloat16", "num_overflowing": overflowing}
            output.restart(plan)
            continue
        if work.options.is_verified:
            _verify(work, output, share.of(shards))
        if not is_whole:
            return None
        lost = overflowing or plan["num_overflowing"]
        weights = _Weights(dtype=plan["dtype"], shards=shards, written=written, num_overflowing=lost)
        return _with_the_rest(work, output, weights)


def _write_missing(work: ConsolidationPlan, output: Output, shards: Sequence[Shard], progress: Progress) -> None:
    settings = Settings(
        num_workers=work.options.num_workers,
        clamp=work.options.overflow == "clamp",
        has_statistics=work.options.has_statistics,
        has_sums=work.options.checks_source,
    )
    missing = [shard for shard in shards if output.written(shard) is None]
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    done = total - sum(tensor.num_bytes for shard in missing for tensor in shard.tensors)
    for batch in [missing] if output.has_room_for_all else [[shard] for shard in missing]:
        write_shards(
            [(shard, output.temporary(shard)) for shard in batch],
            settings,
            finished=output.finish,
            progress=lambda written, _, before=done: progress(before + written, total),  # type: ignore[misc]
        )
        done += sum(tensor.num_bytes for shard in batch for tensor in shard.tensors)


def _verify(work: ConsolidationPlan, output: Output, shards: Sequence[Shard]) -> None:
    places = [output.place(shard) for shard in shards]
    verify_shards(shards, places, num_workers=work.options.num_workers, clamp=work.options.overflow == "clamp")


def _overflowing(work: ConsolidationPlan, dtype: str, written: Sequence[WrittenShard]) -> dict[str, int]:
    """Return what overflows, by parameter.

    Raise `RunError` where that, or NaN, is refused.
    """
    losses = {name: loss for shard in written for name, loss in shard.losses.items()}
    nonfinite = {name: loss.num_nonfinite for name, loss in losses.items() if loss.num_nonfinite}
    if nonfinite:
        raise RunError(
            f"{work.source.path}: NaN or infinite values in {_named(nonfinite)}; the training had diverged"
            + ("" if work.source.step is None else f" by step {work.source.step}")
            + ", use an older checkpoint"
        )
    overflowing = {name: loss.num_overflowing for name, loss in losses.items() if loss.num_overflowing}
    may_fall_back = work.options.overflow == "bfloat16" and dtype == "float16"
    if overflowing and work.options.overflow != "clamp" and not may_fall_back:
        advice = "consolidate with dtype bfloat16, or clamp them" if dtype == "float16" else "clamp them"
        raise RunError(f"{work.source.path}: values beyond {dtype} in {_named(overflowing)}; {advice}")
    return overflowing


def _with_the_rest(work: ConsolidationPlan, output: Output, weights: _Weights) -> Manifest:
    small: list[FileRecord] = []
    for name, content in _small_files(work, weights):
        output.write(name, content)
        digest = hashlib.sha256(content).hexdigest()
        small.append(FileRecord(name=name, num_bytes=len(content), sha256=digest))
    return _manifest(work, weights, tuple(sorted(small, key=lambda file: file.name)))


def _small_files(work: ConsolidationPlan, weights: _Weights) -> Iterator[tuple[str, bytes]]:
    if len(weights.shards) > 1:
        yield INDEX_NAME, index_text(weights.shards).encode()
    yield from beside(work.source, work.copied_from, weights.dtype)
    adapter, config = work.source.adapter_config or {}, last_config(work.copied_from, CONFIG_NAME) or {}
    named = (work.options.base_model, adapter.get("base_model_name_or_path"), config.get("_name_or_path"))
    base_model = next((found for name in named if name and (found := hub_id(str(name)))), None)
    text = card(
        work.source,
        dtype=weights.dtype,
        base_model=base_model,
        num_overflowing=weights.num_overflowing,
    )
    yield CARD_NAME, text.encode()


def _manifest(work: ConsolidationPlan, weights: _Weights, files: tuple[FileRecord, ...]) -> Manifest:
    source = work.source
    large = tuple(written.file for written in weights.written)
    losses = [loss for written in weights.written for loss in written.losses.values()]
    return Manifest(
        dtype=weights.dtype,
        content=source.content,
        source=origin(source),
        kind=source.kind,
        tag=source.tag,
        step=source.step,
        zero_stage=source.zero_stage,
        world_size=source.world_size,
        ds_version=source.ds_version,
        num_params=sum(tensor.num_elements for tensor in source.tensors),
        num_bytes=sum([file.num_bytes for file in files] + [file.num_bytes for file in large]),
        weights=large,
        files=files,
        digest=digest_of_files(large, files),
        request=work.request,
        num_overflowing=dict(weights.num_overflowing),
        num_flushed=sum(loss.num_flushed for loss in losses) if work.options.has_statistics else None,
    )


def _found(out: Place, work: ConsolidationPlan, *, reads_all: bool) -> Manifest | None:
    """Return the manifest of *out* where this very consolidation has made it already."""
    if not (out / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(out)
    if manifest.request != work.request:
        raise UsageError(f"{out}: holds another consolidated model already; remove it or name another place")
    verify_manifest(out, reads_all=reads_all)
    clear_leftovers(out)
    return manifest


def _refuse_target(source: Source, out: Place) -> None:
    if not isinstance(out, Path):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not an empty folder; name another")
    if isinstance(source.path, Path):
        parent = source.path.parent
        is_named = any(re.fullmatch(r"(checkpoint|step)-\d+", path.name) for path in (parent, parent.resolve()))
        refuse_within(parent if is_named else source.path, out)


def refuse_within(checkpoint: Place, out: Place) -> None:
    """Raise `UsageError` where *out* lies in the folder *checkpoint*.

    Links are followed. It would make the checkpoint the newest by date, and trainers delete the others by date.
    """
    if not (isinstance(checkpoint, Path) and isinstance(out, Path)):
        return
    if out.resolve().is_relative_to(checkpoint.resolve()):
        raise UsageError(f"{out}: lies within the checkpoint {checkpoint}; name a folder outside of it")


def _named(counts: Mapping[str, int]) -> str:
    """Name the parameters with the most values first, the rest as a number."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{name!r} ({count})" for name, count in ranked[:10])
    return named + (f" and {len(ranked) - 10} more tensors" if len(ranked) > 10 else "")


def _encoded(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def _silent(num_bytes: int, total: int) -> None:
    """Show nothing."""
