"""Plan for torch's DistributedDataParallel: every rank holds the full model.

The float32 weights are the masters. A single rank is planned for in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...checkpoints.formats.tensors import FloatDtype
from ...checkpoints.sizes import StateBytes
from ..facts import ModelFacts
from ..forecast.parameters import Params
from ..plan import Batch, ForecastLine
from ..schema import StageSettings
from .base import ModelStates, StatePart


def working_dtype(settings: StageSettings) -> FloatDtype:
    """Return float32: autocast makes the 16-bit copies."""
    return "float32"


def model_states(settings: StageSettings, world_size: int) -> ModelStates:
    """Return float32 weights, gradients with DDP's copy of each, and two moments."""
    return ModelStates(
        weights=StatePart(bytes_per_param=4),
        gradients=StatePart(bytes_per_param=8),
        optimizer=StatePart(bytes_per_param=8),
    )


def exchange_memory(settings: StageSettings, params: Params, batch: Batch) -> list[ForecastLine]:
    """Return nothing: `model_states` counts the buckets of gradients."""
    return []


def state_bytes(settings: StageSettings, world_size: int) -> StateBytes:
    """Return what rank 0 writes for all ranks."""
    return StateBytes(trainable=12, note="4 B weights + 8 B moments", frozen=4)


def refusals(settings: StageSettings, model: ModelFacts) -> Iterator[str]:
    """Refuse offloading, which needs sharding."""
    offload = settings.train.zero.offload
    if offload != "none":
        yield f"train.zero.offload {offload} needs ZeRO; set train.zero.stage=1 (to 3) or train.zero.offload=none"
