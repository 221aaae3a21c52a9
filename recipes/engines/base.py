"""Define what planning asks of a sharding engine, and the values of its answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from ...checkpoints.formats.tensors import FloatDtype
from ...checkpoints.sizes import StateBytes
from ..facts import ModelFacts
from ..forecast.parameters import Params
from ..plan import Batch, ForecastLine
from ..schema import StageSettings

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True, kw_only=True)
class StatePart:
    """A part of the model states: bytes per parameter, who shares it, where it is."""

    bytes_per_param: float
    shared_by: int = 1
    in_host_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """The bytes of a rank between two steps; frozen parameters count in *weights*."""

    weights: StatePart
    gradients: StatePart
    optimizer: StatePart


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What the ranks' exchange and the step take beside the model states.

    *held* is there when a forward pass ends; *before* goes with the activations. *after* comes when the activations go,
    in the backward pass and the step; so do gradients, unless they stay from one forward pass to the next.
    """

    held: tuple[ForecastLine, ...] = ()
    before: tuple[ForecastLine, ...] = ()
    after: tuple[ForecastLine, ...] = ()
    gradients_stay: bool


class Engine(Protocol):
    """A module of this package: `ddp` and `deepspeed` have these functions."""

    def working_dtype(self, settings: StageSettings) -> FloatDtype:
        """Return the dtype of the model's weights; float32 where they are the masters."""
        ...

    def model_states(self, settings: StageSettings, world_size: int, moment_bytes: float) -> ModelStates:
        """Return what a rank holds of weights, gradients and optimizer states.

        *moment_bytes* are those of the optimizer for each parameter.
        """
        ...

    def exchange(self, settings: StageSettings, params: Params, batch: Batch, device: Device) -> Exchange:
        """Return what a rank takes to exchange parameters and gradients, and in its step."""
        ...

    def state_bytes(self, settings: StageSettings, world_size: int, moment_bytes: float) -> StateBytes:
        """Return what a full checkpoint holds for each parameter."""
        ...

    def refusals(self, settings: StageSettings, model: ModelFacts) -> Iterator[str]:
        """Yield each reason why the engine cannot train this, and what to set instead."""
        ...
