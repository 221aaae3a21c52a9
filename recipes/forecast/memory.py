"""Forecast what a plan will take: memory of one device here, storage of the run in `storage.py`. Formulas only."""

from __future__ import annotations

from collections.abc import Sequence

from ...checkpoints.sizes import DTYPE_BYTES
from ..facts import Inputs, ModelFacts
from ..plan import Batch, Forecast, ForecastLine, Stage
from ..schema import StageSettings
from .parameters import Params, params_of
from .storage import storage_of


def forecast(inputs: Inputs, stages: Sequence[Stage]) -> Forecast:
    """Return what the run of *stages* will take."""
    storage, ladders = storage_of(inputs, stages)
    device = {
        stage.name: tuple(device_memory(stage.settings, inputs.model, stage.batch))
        for stage in stages
        if stage.batch is not None
    }
    return Forecast(
        storage=tuple(storage),
        storage_peak_bytes=sum(line.num_bytes for line in storage),
        ladders=ladders,
        device=device,
    )


def device_memory(settings: StageSettings, model: ModelFacts, batch: Batch) -> list[ForecastLine]:
    """Return the memory of one rank while training, line by line.

    Model states after Rajbhandari et al. 2020 (ZeRO, table 1). Without ZeRO the float32 weights
    are the masters; with it they are kept beside the working copy, with the two moments. What
    talking to the other ranks adds was measured (benchmarks/memory.py).
    """
    params, zero = params_of(settings, model), settings.train.zero
    work = DTYPE_BYTES[settings.train.precision] if zero.stage else 4
    base = 0.5 if settings.adapter.method == "qlora" else work
    weights = [(work, params.trainable, "")] + [(base, params.frozen, " frozen")] * bool(params.frozen)
    states = 12 if zero.stage else 8

    def line(what: str, parts: list[tuple[float, int, str]], sharded_from: int, in_host_memory: bool) -> ForecastLine:
        ranks = batch.world_size if zero.stage >= sharded_from else 1
        formula = " + ".join(f"{width:g} B x {count:,}{note}" for width, count, note in parts)
        if ranks > 1:
            formula = f"({formula}) / {ranks} ranks"
        if in_host_memory:
            return ForecastLine(what=what, num_bytes=0, formula=f"{formula}, in host memory")
        num_bytes = int(sum(width * count for width, count, _ in parts) / ranks)
        return ForecastLine(what=what, num_bytes=num_bytes, formula=formula)

    return [
        line("weights", weights, 3, zero.offload == "both"),
        line("gradients", [(work if zero.stage else 8, params.trainable, "")], 2, False),  # and DDP's copy of each
        line("optimizer states", [(states, params.trainable, "")], 1, zero.offload != "none"),
        *_exchange(settings, params, work, batch),
        _activations(settings, model, batch),
    ]


def _exchange(settings: StageSettings, params: Params, work: int, batch: Batch) -> list[ForecastLine]:
    """Return what ZeRO-3 holds for a while: gathered weights, the bucket of gradients, its flat copy and share."""
    zero, ranks = settings.train.zero, batch.world_size
    if zero.stage < 3:
        return []
    sharding = zero.config.get("zero_optimization", {})
    live = min(params.trainable + params.frozen, int(sharding.get("stage3_max_live_parameters", 1e9)))
    bucket = min(params.trainable, int(sharding.get("reduce_bucket_size", 5e8)))
    return [
        ForecastLine(what="gathered weights", num_bytes=work * live, formula=f"{work} B x {live:,}"),
        ForecastLine(
            what="gradient buckets",
            num_bytes=int(work * bucket * (2 + 1 / ranks)),
            formula=f"{work} B x {bucket:,} x (2 + 1 / {ranks} ranks)",
        ),
    ]


def _activations(settings: StageSettings, model: ModelFacts, batch: Batch) -> ForecastLine:
    """Return what forward leaves for backward.

    After Korthikanti et al. 2022 (eq. 2): 34 s b h + 5 a s^2 b bytes a layer at 16 bits, whose second
    term only eager attention leaves; with recomputation one layer's, and the inputs of all. A gated
    layer (Llama and its kin) leaves 10 h + 4 i numbers a token instead of 17 h: three at either norm,
    query, key, value and their answer; gate, its SiLU, up, and their product.
    """
    config = model.config

    def number(*names: str, default: int = 0) -> int:
        found = (config.get(name) for name in names)
        return next((int(value) for value in found if isinstance(value, int)), default)

    hidden, layers = number("hidden_size", "n_embd", "d_model"), number("num_hidden_layers", "n_layer", "num_layers")
    heads, vocabulary = number("num_attention_heads", "n_head", default=1), number("vocab_size")
    tokens, rows = settings.data.max_tokens, batch.micro_batch
    width = DTYPE_BYTES[settings.train.precision]
    is_gated = any("gate_proj" in tensor.name or "gate_up_proj" in tensor.name for tensor in model.tensors)
    inner = number("intermediate_size") if is_gated else 0
    layer = width * tokens * rows * (10 * hidden + 4 * inner if is_gated else 17 * hidden)
    formula = f"{width} B x (10 x {hidden} + 4 x {inner})" if is_gated else f"17 x {width} B x {hidden}"
    if settings.model.attention == "eager":
        layer += 5 * heads * tokens * tokens * rows * width // 2
        formula += f" + 2.5 x {width} B x {heads} heads x {tokens}"
    logits = 3 * 4 * tokens * rows * vocabulary  # float32 logits, their softmax and its gradient
    if settings.train.gradient_checkpointing:
        total = layer + width * tokens * rows * hidden * layers + logits
        layers_formula = f"{formula} + {layers} layers x {width} B x {hidden}"
    else:
        total, layers_formula = layer * layers + logits, f"{layers} layers x ({formula})"
    formula = f"{rows} x {tokens} tokens x ({layers_formula} + 12 B x {vocabulary:,} words)"
    return ForecastLine(what="activations", num_bytes=total, formula=formula)
