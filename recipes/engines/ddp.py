"""Plan for torch's DistributedDataParallel: every rank holds the full model.

The float32 weights are the masters, unless the recipe does without. A single rank is planned for in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...checkpoints.formats.tensors import DTYPES, FloatDtype
from ...checkpoints.sizes import StateBytes
from ..facts import ModelFacts
from ..forecast.parameters import Params
from ..plan import Batch, ForecastLine
from ..schema import StageSettings
from .base import ModelStates, StatePart


def working_dtype(settings: StageSettings) -> FloatDtype:
    """Return float32, of which autocast makes 16-bit copies, or the precision alone."""
    return "float32" if settings.train.master_weights else settings.train.precision


def model_states(settings: StageSettings, world_size: int, moment_bytes: float) -> ModelStates:
    """Return the weights, the gradients with DDP's copy of each, and the moments."""
    width = DTYPES[working_dtype(settings)].num_bytes
    return ModelStates(
        weights=StatePart(bytes_per_param=width),
        gradients=StatePart(bytes_per_param=2 * width),
        optimizer=StatePart(bytes_per_param=moment_bytes),
    )


def exchange_memory(settings: StageSettings, params: Params, batch: Batch) -> list[ForecastLine]:
    """Return nothing: `model_states` counts the buckets of gradients."""
    return []


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
