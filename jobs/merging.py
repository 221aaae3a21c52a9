"""Merge an adapter with peft itself, in memory.

It is for adapters that the streamed merge does not know. The model is built as it trained, gets the weights of the
checkpoint, and is written in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.consolidation.reader import Reader
from ..checkpoints.formats.detect import open_source
from ..checkpoints.formats.lora import saved_name
from ..checkpoints.formats.tensors import Source, SourceTensor
from ..errors import RunError
from ..files import digest_of, remove_tree
from ..recipes.schema import StageSettings


def merge_with_peft(settings: StageSettings, checkpoint: Source, base: Path, tokenizer: Path, folder: Path) -> Source:
    """Write the model that peft makes of *base* and an adapter into *folder*.

    Args:
        checkpoint: the adapter with the names that it has in its files, as `open_source` finds it with `is_raw`.
        tokenizer: the folder of the model's tokenizer.

    Returns:
        The written model. It stands for the same checkpoint whenever it is made.

    Raises:
        RunError: the checkpoint lacks a parameter that the recipe trains.
    """
    model = _adapted(settings, base, tokenizer)
    _load(model, checkpoint)
    if folder.exists():
        remove_tree(folder)  # of an attempt that was killed
    model.merge_and_unload().save_pretrained(folder)
    return replace(
        open_source(folder),
        step=checkpoint.step,
        kind=checkpoint.kind,
        tag=checkpoint.tag,
        zero_stage=checkpoint.zero_stage,
        world_size=checkpoint.world_size,
        ds_version=checkpoint.ds_version,
        digest=digest_of([checkpoint.digest, "peft"]),
    )


def _adapted(settings: StageSettings, base: Path, tokenizer: Path) -> Any:
    """Return the model as it trained, but float32 and not quantised."""
    from .training.model import build_model, load_tokenizer

    plain = replace(
        settings,
        adapter=replace(settings.adapter, method="lora"),
        train=replace(settings.train, precision="float32", gradient_checkpointing=False),
    )
    return build_model(plain, base, load_tokenizer(settings, tokenizer), has_weights=True)


def _load(model: Any, checkpoint: Source) -> None:
    import torch

    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    with Reader() as reader, torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            tensor = next((stored[one] for one in _names_of(name) if one in stored), None)
            if tensor is None or tensor.shape != tuple(parameter.shape):
                raise RunError(f"{checkpoint.path}: has no {name!r} of shape {tuple(parameter.shape)}")
            parameter.copy_(_values(reader, tensor))


def _names_of(name: str) -> Iterator[str]:
    """Yield the names of a trained parameter: in training, and in peft's files."""
    yield name
    yield saved_name(name) or name
    yield name.replace(".default.", ".").removesuffix(".default")


def _values(reader: Reader, tensor: SourceTensor) -> Any:
    import torch

    values = reader.read(tensor, 0, tensor.num_elements)
    return torch.from_numpy(values).view(getattr(torch, tensor.dtype)).view(tensor.shape)
