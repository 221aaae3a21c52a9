"""Forecast the device memory of predictions. Pure.

Models that have no place are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoints.formats.tensors import DTYPES
from ...cluster.site import Site
from ..facts import Inputs, ModelFacts
from ..generation import TRANSFORMERS, VLLM, WEIGHTS_SHARE, engine_of
from ..model_kinds import fails_loaded_in_half, kind_of
from ..plan import ForecastLine, Stage
from ..refusals import node_memory, rank_memory
from ..retention import model_dtype
from ..tasks import task_of
from .parameters import layer_numbers, quantisable_of

_BYTES = {"4bit": 0.5, "8bit": 1.0}  # of a quantised weight


def prediction_memory(stage: Stage, inputs: Inputs) -> list[ForecastLine]:
    """Return the memory of one device of a predict stage, line by line.

    A batch is as large as `predict.batch_tokens` allows; where memory is too small for it, smaller ones are tried.
    """
    rows, tokens = _batch(stage, inputs)
    if engine_of(stage.settings).name == VLLM.name:
        rows = 1  # it takes what `predict.vllm.memory_share` leaves, and puts in as many as have room
    return [_weights(stage, inputs.model), *_computed(stage, inputs, rows, tokens)]


def _weights(stage: Stage, model: ModelFacts) -> ForecastLine:
    settings, width = stage.settings, DTYPES[_dtype(stage, model)].num_bytes
    small = quantisable_of(settings, model) if settings.predict.load_in else 0
    num_bytes, formula = width * (model.num_params - small), f"{width} B x {model.num_params - small:,}"
    if settings.predict.load_in:
        each = _BYTES[settings.predict.load_in]
        num_bytes, formula = num_bytes + int(each * small), f"{each:g} B x {small:,} + {formula}"
    if (devices := _devices(stage)) > 1:
        num_bytes, formula = math.ceil(num_bytes / devices), f"({formula}) / {devices} devices"
    if settings.predict.offload and engine_of(settings).name != TRANSFORMERS.name:
        return ForecastLine(what="weights", num_bytes=0, formula=f"{formula}, in host memory")
    if settings.predict.offload:
        formula += "; what has no place stays in host memory"
    return ForecastLine(what="weights", num_bytes=num_bytes, formula=formula)


def _devices(stage: Stage) -> int:
    """Return over how many devices a model is spread.

    Without ranks of its own it has all cores of a CPU, and one memory.
    """
    is_apart = stage.resources.device == "gpu" or engine_of(stage.settings).name != TRANSFORMERS.name
    return stage.resources.devices_per_node if is_apart else 1


def _dtype(stage: Stage, model: ModelFacts) -> str:
    """Return the arithmetic of a predict stage.

    Its job will choose it alike, in `jobs.generation.prediction_key`.
    """
    if stage.settings.predict.dtype is not None:
        return stage.settings.predict.dtype
    if stage.resources.device == "cpu" or fails_loaded_in_half(model.config):
        return "float32"
    if stage.model.made_by is not None:
        return model_dtype(stage.settings)
    own = str(model.config.get("dtype") or model.config.get("torch_dtype") or model.tensors[0].dtype)
    return own if own in DTYPES else "float32"


def _batch(stage: Stage, inputs: Inputs) -> tuple[int, int]:
    """Return the rows of the largest batch, and the tokens of one."""
    predict, lengths = stage.settings.predict, inputs.lengths_of(stage.name, "predict")
    beams = (predict.num_beams or 1) if task_of(stage.settings.task).generates else 1
    longest = lengths.longest_kept if lengths is not None else 0
    new = predict.held_tokens if task_of(stage.settings.task).generates else 0
    tokens = max(1, longest + new)
    most = min(predict.batch_rows, stage.splits["predict"].num_rows)
    return beams * max(1, min(most, predict.batch_tokens // (beams * tokens))), tokens


def _computed(stage: Stage, inputs: Inputs, rows: int, tokens: int) -> list[ForecastLine]:
    """Return what a batch takes besides the weights."""
    settings, config = stage.settings, inputs.model.config
    width, task = DTYPES[_dtype(stage, inputs.model)].num_bytes, task_of(settings.task)
    outputs, noun = task.outputs(config)
    numbers, formula = layer_numbers(inputs.model)
    layer, formula = width * numbers, f"{width} B x ({formula})"
    if not task.generates:
        num_bytes, formula = rows * tokens * (layer + 4 * outputs), f"{formula} + 4 B x {outputs:,} {noun}"
        return [ForecastLine(what="a batch", num_bytes=num_bytes, formula=f"{rows} x {tokens} tokens x ({formula})")]
    layers, kept = _kept_numbers(config)
    shared = engine_of(settings).name == TRANSFORMERS.name and _devices(stage)
    held = ForecastLine(
        what="keys and values",
        num_bytes=math.ceil(2 * width * layers * kept * rows * tokens / (shared or 1)),
        formula=f"{rows} rows x {tokens} tokens x {layers} layers x 2 x {width} B x {kept}"
        + (f" / {shared} devices" if shared > 1 else ""),
    )
    num_bytes = rows * (tokens * layer + 8 * outputs)
    formula = f"{rows} rows x ({tokens} tokens x ({formula}) + 8 B x {outputs:,} {noun})"
    return [held, ForecastLine(what="a batch", num_bytes=num_bytes, formula=formula)]


def _kept_numbers(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the layers that keep keys and values, and the numbers of a key."""

    def number(*names: str) -> int:
        return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)

    hidden, heads = number("hidden_size", "n_embd", "d_model"), number("num_attention_heads", "n_head", "num_heads")
    if kind_of(config) == "encoder-decoder":
        heads = number("decoder_attention_heads") or heads
        layers = number("decoder_layers", "num_decoder_layers", "num_layers")
    else:
        layers = number("num_hidden_layers", "n_layer", "num_layers")
    each = number("head_dim", "d_kv") or (hidden // heads if heads else hidden)
    return layers, (number("num_key_value_heads") or heads or 1) * each


def memory_refusals(stage: Stage, site: Site, inputs: Inputs) -> Iterator[str]:
    """Refuse a predict stage whose model has no place.

    The memory of its devices must be known. What it needs is one row beside the weights, or what the job leaves free
    of the devices over which it deals out a model.
    """
    if stage.record.leaves != "predictions":
        return
    is_own, predict = engine_of(stage.settings).name == TRANSFORMERS.name, stage.settings.predict
    on_cpu = stage.resources.device == "cpu"
    there = node_memory(stage, site) if on_cpu and is_own else rank_memory(stage, site)
    weights, where = _weights(stage, inputs.model).num_bytes, "on a CPU" if on_cpu else "a device"
    _, tokens = _batch(stage, inputs)
    need = weights + sum(line.num_bytes for line in _computed(stage, inputs, predict.num_beams or 1, tokens))
    devices = int(weights * _devices(stage) / (WEIGHTS_SHARE * max(1, there))) + 1
    if is_own and predict.offload and there > 0:
        need = max(0, weights - int(WEIGHTS_SHARE * there)) * _devices(stage)
        there, where = node_memory(stage, site), "of host memory"
    elif is_own and _devices(stage) > 1:
        need = int(weights / WEIGHTS_SHARE)
    if need > there > 0:
        yield (
            f"stage {stage.name!r} needs {need / 1e9:.3g} GB {where} for its model, and there are "
            f"{there / 1e9:.3g} GB; set {', or '.join(_ways(stage, devices))}"
        )


def _ways(stage: Stage, devices: int) -> Iterator[str]:
    """Yield the overrides that may give a model a place.

    It would need so many *devices*.
    """
    predict, engine = stage.settings.predict, engine_of(stage.settings)
    if "load_in" in engine.options and predict.load_in != "4bit":
        yield "predict.load_in=4bit"
    if stage.resources.device == "cpu":
        if predict.dtype is None and predict.load_in is None:
            yield "predict.dtype=bfloat16"
        yield f"more memory in resources.{stage.name}.memory_gb"
        return
    if engine.spans_devices:
        yield f"resources.{stage.name}.devices_per_node={max(devices, stage.resources.devices_per_node + 1)}"
    if "offload" in engine.options and not predict.offload and predict.load_in is None:
        yield "predict.offload=true"
