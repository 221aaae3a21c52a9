"""Decide everything about a consolidation before a weight is read.

That is options, base, shared weights, files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import NotFoundError, UsageError
from ...files import digest_of
from ...remote import Place, parse_place
from ..formats.companion_files import ADAPTER_CONFIG_NAME, CONFIG_NAME, last_config
from ..formats.detect import open_source
from ..formats.lora import merge_adapter
from ..formats.safetensors_file import Shard, plan_shards
from ..formats.tensors import Source
from .model_names import fitted, in_stored_form
from .options import ConsolidateOptions


@dataclass(frozen=True, kw_only=True)
class ConsolidationPlan:
    """Everything that is decided before a weight is read.

    *request* stands for checkpoint and options.
    """

    source: Source
    options: ConsolidateOptions
    copied_from: tuple[Place, ...]
    request: str

    def shards(self, dtype: str) -> tuple[Shard, ...]:
        is_adapter = self.source.content == "adapter"  # peft loads a single file only
        return plan_shards(
            self.source.tensors,
            dtype=dtype,
            max_shard_bytes=None if is_adapter else self.options.max_shard_bytes,
            stem="adapter_model" if is_adapter else "model",
        )


def plan_output(source: Source, options: ConsolidateOptions) -> tuple[Shard, ...]:
    """Return the files that *source* becomes, planned from headers alone."""
    return plan_consolidation(source, options).shards(options.dtype)


def plan_consolidation(source: Source, options: ConsolidateOptions) -> ConsolidationPlan:
    """Return what is to be written; reads headers and configurations only."""
    source = _configured(source, options.copy_from)
    base = None
    if options.is_merged or options.base_dir is not None:
        if source.content != "adapter" or source.adapter_config is None:
            raise UsageError(f"{source.path}: is a complete model, not an adapter; there is nothing to merge")
        base = _base_dir(source, options)
        source = _merged(source, base, source.adapter_config)
    copied_from = tuple(folder for folder in (base, options.copy_from) if folder is not None)
    config = last_config(copied_from, CONFIG_NAME) if source.content == "model" else None
    if config is not None and options.is_compared:
        source = fitted(source, config)
    elif config is not None and base is None:
        source = in_stored_form(source, config)
    source = _untied(source, copied_from)
    if not source.tensors:
        raise UsageError(f"{source.path}: holds no tensors")
    asked = {
        "source": source.digest,
        "dtype": options.dtype,
        "max_shard_bytes": options.max_shard_bytes,
        "overflow": options.overflow,
        "has_statistics": options.has_statistics,
        "tensors": [tensor.name for tensor in source.tensors],
    }
    return ConsolidationPlan(source=source, options=options, copied_from=copied_from, request=digest_of(asked))


def _configured(source: Source, copy_from: Place | None) -> Source:
    """Give an adapter its configuration.

    Without its scaling the weights mean nothing.
    """
    if source.content == "model" or source.adapter_config is not None:
        return source
    config = last_config([copy_from] if copy_from is not None else [], ADAPTER_CONFIG_NAME)
    if config is None:
        raise NotFoundError(
            f"{source.path}: has no {ADAPTER_CONFIG_NAME} beside it, which holds the scaling; put it there, or write "
            "all weights as they stand with --adapter raw"
        )
    return replace(source, adapter_config=config)


def _base_dir(source: Source, options: ConsolidateOptions) -> Place | None:
    """Return the folder of an adapter's base.

    Return None where the checkpoint holds the base itself.
    """
    if options.base_dir is not None or source.base is not None:
        return options.base_dir
    named = str((source.adapter_config or {}).get("base_model_name_or_path") or "")
    if not named or not parse_place(named).is_dir():
        what = f"its base model {named!r} is not a folder here" if named else "its configuration names no base model"
        raise NotFoundError(f"{source.path}: {what}; name the folder of the base with --base DIR")
    return parse_place(named)


def _merged(source: Source, base_dir: Place | None, config: Mapping[str, object]) -> Source:
    base = open_source(base_dir) if base_dir is not None else source.base
    assert base is not None  # else a folder would have been named
    merged = merge_adapter(source, base, config)
    return replace(merged, base=None, digest=digest_of([source.digest, base.digest]))


def _untied(source: Source, copied_from: Sequence[Place]) -> Source:
    """Store shared weights under both names where loading will not tie them.

    The configuration says whether it will.
    """
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
