"""Forecast what a plan will take: memory here, storage in `storage.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ...checkpoints.formats.tensors import DTYPES
from ..engines import engine_of
from ..engines.base import Device, StatePart
from ..facts import Inputs, ModelFacts
from ..model_kinds import kind_of
from ..optimizers import moment_bytes
from ..plan import Batch, Forecast, ForecastLine, Stage
from ..schema import StageSettings
from ..tasks import task_of
from .parameters import layer_numbers, params_of
from .prediction import prediction_memory
from .storage import storage_of

_LEARNS: tuple[Literal["train", "eval"], ...] = ("train", "eval")


def forecast(inputs: Inputs, stages: Sequence[Stage]) -> Forecast:
    """Return what the run of *stages* will take."""
    storage, checkpoints = storage_of(inputs, stages)
    device = {
        stage.name: tuple(device_memory(as_read(stage, inputs), inputs.model, stage.batch, stage.resources.device))
        for stage in stages
        if stage.batch is not None
    } | {
        stage.name: tuple(prediction_memory(stage, inputs)) for stage in stages if stage.record.leaves == "predictions"
    }
    return Forecast(
        storage=tuple(storage),
        storage_peak_bytes=sum(line.num_bytes for line in storage),
        checkpoints=checkpoints,
        device=device,
    )


def as_read(stage: Stage, inputs: Inputs) -> StageSettings:
    """Return a training's settings, with no limit above its longest row.

    A batch is padded to its longest row.
    """
    data = stage.settings.data
    found = [one for use in _LEARNS if (one := inputs.lengths_of(stage.name, use)) is not None]
    if not found:
        return stage.settings
    longest = min(data.max_tokens, max(1, *(one.longest_kept for one in found)))
    target = min(data.max_target_tokens, max(1, *(one.longest_target for one in found)))
    return replace(stage.settings, data=replace(data, max_tokens=longest, max_target_tokens=target))


def device_memory(settings: StageSettings, model: ModelFacts, batch: Batch, device: Device) -> list[ForecastLine]:
    """Return the most memory of one rank while training, line by line.

    The engine says how it holds the model states. Activations are at their most when the forward pass ends; gradients,
    and what exchanges and applies them, come when activations go. Of the two, the larger counts.
    """
    params, engine = params_of(settings, model), engine_of(settings)
    states = engine.model_states(settings, batch.world_size, moment_bytes(settings, model, params))
    trained = states.weights.bytes_per_param
    frozen = [(trained, params.frozen, " frozen")] if params.frozen else []
    if settings.adapter.method == "qlora":
        # peft makes the rest float32: embeddings, norms, and experts that are held in one tensor
        rest = params.frozen - params.quantisable
        frozen = [(0.5, params.quantisable, " in 4 bits"), (4, rest, " frozen")]
    exchange, activations = engine.exchange(settings, params, batch, device), _activations(settings, model, batch)
    gradients = _line("gradients", states.gradients, [(states.gradients.bytes_per_param, params.trainable, "")])
    held, later = ([gradients], [*exchange.after]) if exchange.gradients_stay else ([], [gradients, *exchange.after])
    earlier = [*exchange.before, activations]
    if _sum(earlier) < _sum(later):
        passing = [*later, *map(_off_peak, earlier)]
    else:
        passing = [*map(_off_peak, later), *earlier]
    return [
        _line("weights", states.weights, [(trained, params.trainable, ""), *frozen]),
        _line("optimizer states", states.optimizer, [(states.optimizer.bytes_per_param, params.trainable, "")]),
        *exchange.held,
        *held,
        *passing,
    ]


def _sum(lines: Sequence[ForecastLine]) -> int:
    return sum(line.num_bytes for line in lines)


def _off_peak(line: ForecastLine) -> ForecastLine:
    return replace(line, num_bytes=0, formula=f"{line.formula}, not at the peak")


def host_memory(settings: StageSettings, model: ModelFacts, batch: Batch) -> int:
    """Return the bytes that offloading puts into host memory for one rank."""
    params = params_of(settings, model)
    states = engine_of(settings).model_states(settings, batch.world_size, moment_bytes(settings, model, params))
    parts = (
        (states.weights, params.trainable + params.frozen),
        (states.gradients, params.trainable),
        (states.optimizer, params.trainable),
    )
    return int(sum(held.bytes_per_param * count / held.shared_by for held, count in parts if held.in_host_memory))


def _line(what: str, held: StatePart, parts: Sequence[tuple[float, int, str]]) -> ForecastLine:
    formula = " + ".join(f"{width:g} B x {count:,}{note}" for width, count, note in parts)
    if held.shared_by > 1:
        formula = f"({formula}) / {held.shared_by} ranks"
    if held.in_host_memory:
        return ForecastLine(what=what, num_bytes=0, formula=f"{formula}, in host memory")
    num_bytes = int(sum(width * count for width, count, _ in parts) / held.shared_by)
    return ForecastLine(what=what, num_bytes=num_bytes, formula=formula)


def _activations(settings: StageSettings, model: ModelFacts, batch: Batch) -> ForecastLine:
    """Return what forward leaves for backward.

    After Korthikanti et al. 2022 (eq. 2): 34 s b h + 5 a s^2 b bytes a layer at 16 bits, whose second
    term only eager attention leaves. With recomputation they are those of one layer, half as much for its
    gradients, and the inputs of all layers.
    """
    config = model.config
    if kind_of(config) == "encoder-decoder":
        return _encoder_decoder_activations(settings, config, batch)

    def number(*names: str, default: int = 0) -> int:
        found = (config.get(name) for name in names)
        return next((int(value) for value in found if isinstance(value, int)), default)

    hidden, layers = number("hidden_size", "n_embd", "d_model"), number("num_hidden_layers", "n_layer", "num_layers")
    heads, (outputs, noun) = number("num_attention_heads", "n_head", default=1), task_of(settings.task).outputs(config)
    tokens, rows = settings.data.max_tokens, batch.micro_batch
    width = _width(settings)
    numbers, formula = layer_numbers(model)
    layer, formula = width * tokens * rows * numbers, f"{width} B x ({formula})"
    if settings.model.attention == "eager":
        layer += 5 * heads * tokens * tokens * rows * width // 2
        formula += f" + 2.5 x {width} B x {heads} heads x {tokens}"
    logits = 3 * 4 * tokens * rows * outputs  # float32 logits, their softmax and its gradient
    if settings.train.gradient_checkpointing:
        total = layer * 3 // 2 + width * tokens * rows * hidden * layers + logits
        layers_formula = f"1.5 x ({formula}) + {layers} layers x {width} B x {hidden}"
    else:
        total, layers_formula = layer * layers + logits, f"{layers} layers x ({formula})"
    formula = f"{rows} x {tokens} tokens x ({layers_formula} + 12 B x {outputs:,} {noun})"
    return ForecastLine(what="activations", num_bytes=total, formula=formula)


def _encoder_decoder_activations(settings: StageSettings, config: Mapping[str, Any], batch: Batch) -> ForecastLine:
    """Return what the forward pass of an encoder-decoder leaves for backward.

    A layer of the encoder leaves 17 h numbers a source token, as in `_activations`. One of the decoder leaves 22 h a
    target token, with the norm, query, and answer of its second attention, whose keys and values are 2 h a source
    token. Outputs are those of the target tokens.
    """
    outputs, noun = task_of(settings.task).outputs(config)
    hidden, width = int(config.get("d_model") or config.get("hidden_size") or 0), _width(settings)
    encoder = int(config.get("encoder_layers") or config.get("num_layers") or 0)
    decoder = int(config.get("decoder_layers") or config.get("num_decoder_layers") or encoder)
    sources, targets, rows = settings.data.max_tokens, settings.data.max_target_tokens, batch.micro_batch
    encoder_layer = width * hidden * 17 * sources
    decoder_layer = width * hidden * (22 * targets + 2 * sources)
    total = encoder * encoder_layer + decoder * decoder_layer
    formula = f"{encoder} layers x 17 x {sources} tokens + {decoder} layers x (22 x {targets} + 2 x {sources} tokens)"
    if settings.train.gradient_checkpointing:
        total = max(encoder_layer, decoder_layer) * 3 // 2 + width * hidden * (encoder * sources + decoder * targets)
        formula = f"1.5 x the larger layer + {encoder} x {sources} + {decoder} x {targets} tokens"
    return ForecastLine(
        what="activations",
        num_bytes=rows * (total + 12 * targets * outputs),
        formula=f"{rows} x ({width} B x {hidden} x ({formula}) + 12 B x {targets} tokens x {outputs:,} {noun})",
    )


def _width(settings: StageSettings) -> int:
    return DTYPES[settings.train.precision].num_bytes
