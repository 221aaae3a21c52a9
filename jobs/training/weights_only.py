"""Write a model's weights without its optimizer.

One parameter is in memory at a time. Every rank takes part, since an engine may spread a parameter over them; rank 0
casts the float32 master and writes it at its place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.formats.lora import as_adapter
from ...checkpoints.formats.safetensors_file import INDEX_NAME, Shard, index_text, plan_shards
from ...checkpoints.formats.tensors import Source, SourceTensor
from ...files import read_json
from .engines.base import Engine, SavableTrainer

_LARGEST_HALF = 65_000.0  # below float16's 65,504, since it is the 16-bit working copy that is looked at


def largest_weight(engine: Engine, trainer: SavableTrainer) -> float:
    """Return the largest magnitude among what this rank holds of the trained weights."""
    parts = (engine.local_part(weight) for weight in _model(trainer).parameters() if weight.requires_grad)
    return max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)


def safe_dtype(dtype: str, largest: float) -> str:
    """Return *dtype*, or bfloat16 where float16 cannot hold the *largest* weight."""
    return "bfloat16" if dtype == "float16" and largest > _LARGEST_HALF else dtype


def write_weights(
    engine: Engine, trainer: SavableTrainer, folder: Path, dtype: str, max_shard_bytes: int, *, is_writer: bool
) -> None:
    """Write the weights into *folder*: an adapter's, where one is trained.

    Config and tokenizer are the caller's.

    A rank that cannot write takes part to the end all the same, and raises then.
    """
    model = _model(trainer)
    named = _tensors(model)
    error: Exception | None = None
    places: dict[str, tuple[Path, int, torch.dtype]] = {}
    if is_writer:
        try:
            places = _prepare(engine, model, named, folder, dtype, max_shard_bytes)
        except Exception as failure:  # the other ranks are in the first gathering already
            error = failure
    for name, value in engine.gathered(trainer, named):
        if name in places and error is None:
            try:
                _write(*places[name], value)
            except OSError as failure:
                error = failure
    if error is not None:
        raise error


def _model(trainer: SavableTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return what is written: an adapter's parameters, else all with buffers."""
    parameters = dict(model.named_parameters())
    if hasattr(model, "peft_config"):
        return {name: value for name, value in parameters.items() if value.requires_grad}
    kept = model.state_dict().keys()  # without the buffers that a loaded model computes itself
    return parameters | {name: value for name, value in model.named_buffers() if name in kept}


def _prepare(
    engine: Engine, model: Any, named: dict[str, torch.Tensor], folder: Path, dtype: str, max_shard_bytes: int
) -> dict[str, tuple[Path, int, torch.dtype]]:
    """Write the headers and return file, offset and dtype of each tensor."""
    tensors = tuple(
        SourceTensor(
            name=name,
            shape=engine.full_shape(value),
            dtype=str(value.dtype).removeprefix("torch."),
            segments=(),
            role="trained",
        )
        for name, value in named.items()
    )
    source = Source(path=folder, content="model", tensors=tensors)
    is_adapter = hasattr(model, "peft_config")
    if is_adapter:
        model.peft_config["default"].save_pretrained(folder)
        source = as_adapter(source, read_json(folder / "adapter_config.json"))
    names = dict(zip((one.name for one in source.tensors), named, strict=True))
    shards = plan_shards(
        source.tensors,
        dtype=dtype,
        max_shard_bytes=None if is_adapter else max_shard_bytes,
        stem="adapter_model" if is_adapter else "model",
    )
    places = {}
    for shard in shards:
        _make(folder / shard.file_name, shard)
        for tensor in shard.tensors:
            place = (folder / shard.file_name, tensor.offset_bytes, getattr(torch, tensor.dtype.name))
            places[names[tensor.source.name]] = place
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(index_text(shards))
    return places


def _make(path: Path, shard: Shard) -> None:
    with path.open("wb") as stream:
        stream.write(shard.header)
        stream.truncate(shard.num_bytes)


def _write(path: Path, offset_bytes: int, dtype: torch.dtype, value: torch.Tensor) -> None:
    data = memoryview(value.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data, offset_bytes)
            data, offset_bytes = data[written:], offset_bytes + written
    finally:
        os.close(descriptor)
