"""Plan for torch's DistributedDataParallel: every rank holds the full model.

The float32 weights are the masters, unless the recipe does without. A single rank is planned for in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...checkpoints.formats.tensors import DTYPES, FloatDtype
from ...checkpoints.sizes import StateBytes
from ..facts import ModelFacts
from ..forecast.parameters import Params
from ..optimizers import takes_roots
from ..plan import Batch, ForecastLine
from ..schema import StageSettings
from .base import Device, Exchange, ModelStates, StatePart


def working_dtype(settings: StageSettings) -> FloatDtype:
    """Return float32, of which autocast makes 16-bit copies, or the precision alone."""
    return "float32" if settings.train.master_weights else settings.train.precision


def model_states(settings: StageSettings, world_size: int, moment_bytes: float) -> ModelStates:
    """Return the weights, the gradients, and the moments."""
    width = DTYPES[working_dtype(settings)].num_bytes
    return ModelStates(
        weights=StatePart(bytes_per_param=width),
        gradients=StatePart(bytes_per_param=width),
        optimizer=StatePart(bytes_per_param=moment_bytes),
    )


def exchange(settings: StageSettings, params: Params, batch: Batch, device: Device) -> Exchange:
    """Return DDP's buckets, which hold a copy of every gradient, and AdamW's roots."""
    width, count = DTYPES[working_dtype(settings)].num_bytes, params.trainable
    line = ForecastLine(what="gradient buckets", num_bytes=width * count, formula=f"{width} B x {count:,}")
    return Exchange(
        held=(line,),
        after=(replace(line, what="step"),) if takes_roots(settings, device) else (),
        gradients_stay=batch.accumulation > 1,
    )


def state_bytes(settings: StageSettings, world_size: int, moment_bytes: float) -> StateBytes:
    """Return what rank 0 writes for all ranks."""
    width = DTYPES[working_dtype(settings)].num_bytes
    note = f"{width} B weights + {moment_bytes:.3g} B moments"
    return StateBytes(trainable=width + moment_bytes, note=note, frozen=width)


def refusals(settings: StageSettings, model: ModelFacts) -> Iterator[str]:
    """Refuse offloading, which needs sharding."""
    offload = settings.train.zero.offload
    if offload != "none":
        yield f"train.zero.offload {offload} needs ZeRO; set train.zero.stage=1 (to 3) or train.zero.offload=none"
