"""Find what a training can give up when a device runs out of memory.

The recipe says what, and in which order. An attempt that ran out is followed by one that needs less. The global batch
stays, so the first three give the same losses: only `max_tokens` changes what is learned. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .plan import Batch, Stage
from .schema import StageSettings
from .tasks import task_of

_LEAST_TOKENS = 64


def smaller(batch: Batch, settings: StageSettings) -> Batch | None:
    """Return a batch that needs less memory.

    Return None where nothing more may be given up.
    """
    settings = with_fallbacks(settings, batch.fallbacks)
    train, shorter = settings.train, f"max_tokens={settings.data.max_tokens // 2}"
    for name in train.on_out_of_memory:
        if name == "micro_batch" and batch.micro_batch > 1:
            return _halved(batch)
        if name == "gradient_checkpointing" and not train.gradient_checkpointing:
            return replace(batch, fallbacks=(*batch.fallbacks, name))
        if name == "offload" and train.zero.stage and train.zero.offload == "none":
            return replace(batch, fallbacks=(*batch.fallbacks, name))
        if name == "max_tokens" and _can_be_learned(with_fallbacks(settings, [shorter])):
            return replace(batch, fallbacks=(*batch.fallbacks, shorter))
    return None


def _can_be_learned(settings: StageSettings) -> bool:
    """Return whether rows of so few tokens have something to learn."""
    tokens = settings.data.max_tokens
    has_room = tokens >= _LEAST_TOKENS and tokens > (settings.data.pad_input_to or 0)
    return has_room and not any(task_of(settings.task).faults(settings, ["train"]))


def _halved(batch: Batch) -> Batch:
    """Return *batch* with half the micro batch and the same global batch."""
    micro = batch.micro_batch // 2
    while (batch.micro_batch * batch.accumulation) % micro:
        micro -= 1
    return replace(batch, micro_batch=micro, accumulation=batch.micro_batch * batch.accumulation // micro)


def with_fallbacks(settings: StageSettings, fallbacks: Sequence[str]) -> StageSettings:
    """Return *settings* as an attempt sees them that has given these up."""
    for text in fallbacks:
        name, _, value = text.partition("=")
        train = settings.train
        if name == "gradient_checkpointing":
            settings = replace(settings, train=replace(train, gradient_checkpointing=True))
        elif name == "offload":
            settings = replace(settings, train=replace(train, zero=replace(train.zero, offload="optimizer")))
        elif name == "max_tokens":
            settings = replace(settings, data=replace(settings.data, max_tokens=int(value)))
    return settings


def fallback_refusals(stage: Stage) -> Iterator[str]:
    """Yield what a recipe allows to be given up and could not be."""
    allowed, settings = stage.settings.train.on_out_of_memory, stage.settings
    if "offload" in allowed and not settings.train.zero.stage:
        yield (
            "train.on_out_of_memory has offload, which needs ZeRO; set train.zero.stage=2 or "
            "train.on_out_of_memory=[micro_batch,gradient_checkpointing]"
        )
    if "max_tokens" in allowed and settings.data.packing != "none":
        yield (
            f"train.on_out_of_memory has max_tokens, and data.packing {settings.data.packing} makes other examples; "
            "set train.on_out_of_memory=[micro_batch,gradient_checkpointing]"
        )
    elif "max_tokens" in allowed and not settings.data.long_rows.startswith("cut"):
        yield (
            f"train.on_out_of_memory has max_tokens, and data.long_rows {settings.data.long_rows} shortens no row; "
            "set data.long_rows=cut_right or train.on_out_of_memory=[micro_batch,gradient_checkpointing]"
        )
