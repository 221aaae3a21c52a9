"""Define what a training asks of its engine, and what saving asks of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ....recipes.schema import StageSettings


class Stateful(Protocol):
    """An optimizer or a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs of it."""
        ...


class SavableTrainer(Protocol):
    """The part of transformers' Trainer that saving uses."""

    state: Any
    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Stateful
    lr_scheduler: Stateful

    def _save_rng_state(self, output_dir: str) -> None: ...

    def _save_scaler(self, output_dir: str) -> None: ...


class Engine(Protocol):
    """A module of this package: `ddp` and `deepspeed` have these functions.

    An engine has no function for loading: transformers' Trainer reads what `save_state` wrote, by its
    `resume_from_checkpoint`, and `wrap` makes that reading safe where it is not.
    """

    def start_process_group(self, device: str) -> None:
        """Start the process group where transformers would not."""
        ...

    def arguments(self, settings: StageSettings, device: str) -> dict[str, Any]:
        """Return the engine's own arguments for transformers' TrainingArguments."""
        ...

    def wrap(self, trainer: Any) -> None:
        """Change how *trainer* prepares, writes and reads; called before it trains."""
        ...

    def save_state(self, trainer: SavableTrainer, folder: Path, *, is_writer: bool) -> None:
        """Write weights and optimizer states into *folder*.

        Every rank calls it, one of them with *is_writer*.
        """
        ...

    def full_shape(self, value: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of a tensor of which this rank may hold a part."""
        ...

    def local_part(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return what this rank holds of *parameter*."""
        ...

    def gathered(
        self, trainer: SavableTrainer, named: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every full tensor on every rank: the float32 master of what is trained."""
        ...
