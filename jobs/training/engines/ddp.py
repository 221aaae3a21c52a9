"""Train with torch's DistributedDataParallel, as transformers does by itself.

Rank 0 writes the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ....recipes.schema import StageSettings
from .base import SavableTrainer


def start_process_group(device: str) -> None:
    """Leave it to transformers."""


def arguments(settings: StageSettings, device: str) -> dict[str, Any]:
    """Return DDP's arguments.

    Some parameters take part in no step, such as those that read images, and some not in each: layers are left out at
    random. DDP would wait for their gradients.
    """
    return {"ddp_find_unused_parameters": True}


def wrap(trainer: Any) -> None:
    """Change nothing."""


def save_state(trainer: SavableTrainer, folder: Path, *, is_writer: bool) -> None:
    """Write the model and the optimizer's state on one rank.

    The model is written as it is in memory: resuming reads it by these names. Of an adapter's model only what is
    trained is written; peft would add the whole of resized embeddings.
    """
    if is_writer:
        model = trainer.accelerator.unwrap_model(trainer.model)
        is_adapted = hasattr(model, "peft_config")
        model.save_pretrained(folder, **{"save_embedding_layers" if is_adapted else "save_original_format": False})
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")


def full_shape(value: torch.Tensor) -> tuple[int, ...]:
    """Return the tensor's own shape."""
    return tuple(value.shape)


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter itself."""
    return parameter.data


def gathered(trainer: SavableTrainer, named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors as they are."""
    yield from ((name, value.data) for name, value in named.items())
