"""Forecast what a plan will take: storage of the run, and memory of one device.

Sums and formulas only; the sizes of files are in `checkpoints.sizes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.sizes import DTYPE_BYTES, Size, checkpoint_size, model_size
from .freeze import is_frozen
from .plan import Batch, Forecast, ForecastLine, Inputs, ModelFacts, Stage, TensorFacts
from .schema import Recipe
from .stages import stage_view

_CHECKPOINTS_OF = "checkpoints of "
_LOG_BYTES_PER_STEP = 200  # one line of log and one ledger event, seldom more
_FIXED_LOG_BYTES = 2_000_000  # start-up messages of every stage, W&B's own files: measured 1 to 2 MB


@dataclass(frozen=True, kw_only=True)
class Params:
    """Parameters of a model as a train stage sees them."""

    trainable: int
    frozen: int


def params_of(recipe: Recipe, model: ModelFacts) -> Params:
    """Return how many parameters train and how many are frozen, adapters included."""
    if recipe.adapter.method == "full":
        frozen = sum(_numel(tensor) for tensor in model.tensors if is_frozen(tensor.name, recipe.model.freeze))
        return Params(trainable=model.num_params - frozen, frozen=frozen)
    targets = recipe.adapter.target_modules
    adapters = sum(
        recipe.adapter.rank * sum(tensor.shape)
        for tensor in model.tensors
        if any(takes_adapter(tensor, target) for target in targets)
    )
    saved = sum(
        _numel(tensor)
        for tensor in model.tensors
        if any(f".{name}." in f".{tensor.name}" for name in recipe.adapter.modules_to_save)
    )
    return Params(trainable=adapters + saved, frozen=model.num_params)


def _numel(tensor: TensorFacts) -> int:
    return math.prod(tensor.shape)


def takes_adapter(tensor: TensorFacts, target: str) -> bool:
    """Say whether *target* gives a linear layer's weight an adapter, by peft's rules.

    A target is the end of a module's path; `all-linear` is every linear layer but the head.
    """
    path = tensor.name.removesuffix(".weight")
    module = path.rsplit(".", 1)[-1]
    if len(tensor.shape) != 2 or "embed" in tensor.name or module in ("wte", "wpe", "shared"):
        return False
    return f".{path}".endswith(f".{target}") or (target == "all-linear" and module != "lm_head")


def checkpoint_of(recipe: Recipe, model: ModelFacts, world_size: int) -> Size:
    """Return the size of one checkpoint of a train stage."""
    params = params_of(recipe, model)
    return checkpoint_size(
        trainable=params.trainable,
        frozen=params.frozen,
        zero_stage=recipe.train.zero.stage,
        precision=recipe.train.precision,
        world_size=world_size,
        adapter=recipe.adapter.method != "full",
    )


def weights_of(recipe: Recipe, model: ModelFacts) -> Size:
    """Return the size of a checkpoint that holds weights only: the model, or the adapter."""
    is_adapter = recipe.adapter.method != "full"
    count = params_of(recipe, model).trainable if is_adapter else model.num_params
    return model_size(num_params=count, dtype=recipe.consolidate.dtype)


def later_bytes(found: Forecast) -> int:
    """Return what a run writes besides its checkpoints."""
    return sum(line.num_bytes for line in found.storage if not line.what.startswith(_CHECKPOINTS_OF))


def forecast(recipe: Recipe, inputs: Inputs, stages: Sequence[Stage]) -> Forecast:
    """Return what the run of *stages* will take."""
    storage: list[ForecastLine] = []
    device: dict[str, tuple[ForecastLine, ...]] = {}
    for stage in stages:
        view = stage_view(recipe, stage.name)
        storage += _storage_of(view, inputs, stage)
        if stage.batch is not None:
            device[stage.name] = tuple(device_memory(view, inputs.model, stage.batch))
    steps = sum(stage.batch.steps for stage in stages if stage.batch)
    log_bytes = _FIXED_LOG_BYTES + _LOG_BYTES_PER_STEP * steps
    storage.append(ForecastLine(what="logs, ledger, W&B", num_bytes=log_bytes, formula=f"2 MB + 200 B x {steps} steps"))
    return Forecast(storage=tuple(storage), storage_peak_bytes=sum(line.num_bytes for line in storage), device=device)


def _storage_of(view: Recipe, inputs: Inputs, stage: Stage) -> list[ForecastLine]:
    if stage.batch is not None:
        size = checkpoint_of(view, inputs.model, stage.batch.world_size)
        policy, batch = view.checkpoints, stage.batch
        stay = policy.keep_last + policy.keep_best
        if policy.keep_every_steps:
            stay += batch.steps // math.lcm(policy.keep_every_steps, batch.save_every_steps)
        count = min(stay + 1, math.ceil(batch.steps / batch.save_every_steps))
        formula = f"{count} x {size.num_bytes:,} B [{size.formula}]; {stay} stay and one is being written"
        return [ForecastLine(what=f"{_CHECKPOINTS_OF}{stage.name}", num_bytes=count * size.num_bytes, formula=formula)]
    if stage.kind == "consolidate":
        # an adapter is merged into its base, so its model is as large
        size = model_size(num_params=inputs.model.num_params, dtype=view.consolidate.dtype)
        return [ForecastLine(what=f"model of {stage.name}", num_bytes=size.num_bytes, formula=size.formula)]
    if stage.kind == "predict":
        split = inputs.splits[view.predict.split]
        rows = min(view.predict.rows or split.num_rows, split.num_rows)
        row_bytes = 100 + 4 * view.predict.max_new_tokens
        formula = f"2 (units, merged) x {rows:,} rows x (100 B + 4 B x {view.predict.max_new_tokens} tokens)"
        return [ForecastLine(what=f"predictions of {stage.name}", num_bytes=2 * rows * row_bytes, formula=formula)]
    return []


def device_memory(recipe: Recipe, model: ModelFacts, batch: Batch) -> list[ForecastLine]:
    """Return the memory of one rank while training, line by line.

    Model states after Rajbhandari et al. 2020 (ZeRO, table 1). Without ZeRO the float32 weights
    are the masters; with it they are kept beside the working copy, with the two moments. What
    talking to the other ranks adds was measured (benchmarks/memory.py).
    """
    params, zero = params_of(recipe, model), recipe.train.zero
    work = DTYPE_BYTES[recipe.train.precision] if zero.stage else 4
    base = 0.5 if recipe.adapter.method == "qlora" else work
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
        *_exchange(recipe, params, work, batch),
        _activations(recipe, model, batch),
    ]


def _exchange(recipe: Recipe, params: Params, work: int, batch: Batch) -> list[ForecastLine]:
    """Return what ZeRO-3 holds for a while: gathered weights, the bucket of gradients, its flat copy and share."""
    zero, ranks = recipe.train.zero, batch.world_size
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


def _activations(recipe: Recipe, model: ModelFacts, batch: Batch) -> ForecastLine:
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
    tokens, rows = recipe.data.max_tokens, batch.micro_batch
    width = DTYPE_BYTES[recipe.train.precision]
    is_gated = any("gate_proj" in tensor.name or "gate_up_proj" in tensor.name for tensor in model.tensors)
    inner = number("intermediate_size") if is_gated else 0
    layer = width * tokens * rows * (10 * hidden + 4 * inner if is_gated else 17 * hidden)
    formula = f"{width} B x (10 x {hidden} + 4 x {inner})" if is_gated else f"17 x {width} B x {hidden}"
    if recipe.model.attention == "eager":
        layer += 5 * heads * tokens * tokens * rows * width // 2
        formula += f" + 2.5 x {width} B x {heads} heads x {tokens}"
    logits = 3 * 4 * tokens * rows * vocabulary  # float32 logits, their softmax and its gradient
    if recipe.train.gradient_checkpointing:
        total = layer + width * tokens * rows * hidden * layers + logits
        layers_formula = f"{formula} + {layers} layers x {width} B x {hidden}"
    else:
        total, layers_formula = layer * layers + logits, f"{layers} layers x ({formula})"
    formula = f"{rows} x {tokens} tokens x ({layers_formula} + 12 B x {vocabulary:,} words)"
    return ForecastLine(what="activations", num_bytes=total, formula=formula)
