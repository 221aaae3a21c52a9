"""Compile a recipe, a site and the inputs into a plan. Pure: no disk, clock or environment."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..cluster.site import Site
from ..errors import PlanError
from ..rundir import NAME_PATTERN
from .compose import kind_of, stage_view, stages_of
from .forecast import forecast
from .plan import After, Batch, Forecast, Inputs, Plan, Stage
from .schema import Kind, Recipe, Resources

# What each kind of stage can work on; the nearest stage above of such a kind is taken.
_SOURCES: dict[Kind, tuple[Kind, ...]] = {
    "train": ("consolidate",),
    "consolidate": ("train",),
    "predict": ("consolidate",),
    "merge": ("predict",),
    "score": ("merge",),
}
# A train stage starts from the base model, and predict may: neither must have a source.
_MUST_HAVE_SOURCE: tuple[Kind, ...] = ("consolidate", "merge", "score")


def compile(recipe: Recipe, site: Site, inputs: Inputs) -> Plan:
    """Return the plan of *recipe* at *site*: the same value for the same arguments.

    Raises:
        PlanError: every reason why it cannot work.
    """
    reasons: list[str] = []
    stages: list[Stage] = []
    for name in stages_of(recipe):
        reasons += _stage_faults(recipe, name, stages)
        if not reasons:
            stages.append(_stage(recipe, name, inputs, stages, reasons))
    for stage in stages:
        reasons += _refusals(stage_view(recipe, stage.name), stage, site, inputs)
    if reasons:
        raise PlanError(reasons)
    found = forecast(recipe, inputs, stages)
    reasons += _storage_refusals(recipe, found, inputs)
    if reasons:
        raise PlanError(reasons)
    warnings = tuple(_warnings(recipe, site, inputs, stages, found))
    return Plan(recipe=recipe, site=site, inputs=inputs, stages=tuple(stages), forecast=found, warnings=warnings)


def resources_of(recipe: Recipe, name: str, kind: Kind) -> Resources:
    """Return the resources of a stage: by its name, else its kind, else `default`, else one device."""
    for key in (name, kind, "default"):
        if key in recipe.resources:
            return recipe.resources[key]
    return Resources()


def _stage_faults(recipe: Recipe, name: str, above: list[Stage]) -> Iterator[str]:
    if not NAME_PATTERN.fullmatch(name):
        yield f"stage name {name!r} is no name; use lower-case letters, digits and '-', 63 at most"
        return
    kind, of = kind_of(recipe, name), stages_of(recipe)[name].of
    fitting = [stage.name for stage in above if stage.kind in _SOURCES[kind]]
    if of is not None and of not in fitting:
        yield (
            f"stages.{name}.of is {of!r}; a {kind} stage works on one of the "
            f"{_SOURCES[kind][0]} stages above it: {', '.join(fitting) or 'none'}"
        )
    elif kind in _MUST_HAVE_SOURCE and not fitting:
        yield f"stage {name!r} needs a {_SOURCES[kind][0]} stage above it"


def _stage(recipe: Recipe, name: str, inputs: Inputs, above: list[Stage], reasons: list[str]) -> Stage:
    kind = kind_of(recipe, name)
    fitting = [stage.name for stage in above if stage.kind in _SOURCES[kind]]
    of = stages_of(recipe)[name].of or (fitting[-1] if fitting and kind != "train" else None)
    resources = resources_of(recipe, name, kind)
    batch = _batch(stage_view(recipe, name), resources, inputs, name, reasons) if kind == "train" else None
    # merge runs however the predictions ended, so that what is missing gets reported
    after = (After(stage=of, condition="any" if kind == "merge" else "ok"),) if of else ()
    num_tasks = resources.tasks if kind == "predict" else 1
    return Stage(name=name, kind=kind, of=of, resources=resources, num_tasks=num_tasks, after=after, batch=batch)


def _batch(view: Recipe, resources: Resources, inputs: Inputs, name: str, reasons: list[str]) -> Batch:
    train, ranks = view.train, resources.nodes * resources.devices_per_node
    rows_at_once = ranks * train.micro_batch
    if train.global_batch % rows_at_once:
        lower = train.global_batch // rows_at_once * rows_at_once
        near = [str(number) for number in (lower, lower + rows_at_once) if number]
        reasons.append(
            f"stage {name!r}: train.global_batch {train.global_batch} is not divided by {ranks} ranks x "
            f"train.micro_batch {train.micro_batch}; next to it: {', '.join(near)}"
        )
    steps = train.steps or max(
        1, math.ceil(train.epochs * math.ceil(inputs.splits["train"].num_rows / train.global_batch))
    )
    return Batch(
        world_size=ranks,
        micro_batch=train.micro_batch,
        accumulation=max(1, train.global_batch // rows_at_once),
        steps=steps,
        warmup_steps=math.ceil(train.schedule.warmup_ratio * steps),
        save_every_steps=min(steps, view.checkpoints.every_steps or max(1, steps // 10)),
    )


def _refusals(view: Recipe, stage: Stage, site: Site, inputs: Inputs) -> Iterator[str]:
    yield from _resource_refusals(stage, site)
    if stage.kind == "train":
        yield from _train_refusals(view, stage, inputs)
    if stage.kind == "predict":
        if view.predict.sample and view.predict.num_beams > 1:
            yield (
                f"stage {stage.name!r}: predict.sample with num_beams "
                f"{view.predict.num_beams}; draw tokens or search beams, not both"
            )
        if stage.of is None and not inputs.model.has_weights:
            yield f"stage {stage.name!r} has no model: no consolidate stage above it, and model.path has no weights"


def _resource_refusals(stage: Stage, site: Site) -> Iterator[str]:
    wanted, key = stage.resources, f"resources.{stage.name}"
    if stage.kind in ("consolidate", "merge", "score"):
        return  # they need no device
    if wanted.device == "gpu" and site.gpus_per_node == 0:
        yield f"stage {stage.name!r} wants GPUs and {site.name} has none; set {key}.device=cpu to run on the CPU"
    elif (
        wanted.device == "gpu"
        and wanted.devices_per_node * (wanted.nodes if site.launcher == "local" else 1) > site.gpus_per_node
    ):
        yield (
            f"stage {stage.name!r} wants {wanted.nodes} x {wanted.devices_per_node} "
            f"GPUs; {site.name} has {site.gpus_per_node} on a node"
        )
    if stage.kind != "train" and (wanted.nodes > 1 or wanted.devices_per_node > 1):
        yield f"stage {stage.name!r}: a task of {stage.kind} uses one device; spread its rows with {key}.tasks"


def _train_refusals(view: Recipe, stage: Stage, inputs: Inputs) -> Iterator[str]:
    train, method, zero = view.train, view.adapter.method, view.train.zero
    config = inputs.model.config
    if view.task != "causal_lm":
        yield f"task {view.task!r} can be written down but not run by this version; causal_lm can"
    if train.precision == "float16" and stage.resources.device == "cpu":
        yield "train.precision float16 does not train on a CPU; use bfloat16 or float32"
    if view.model.attention == "flash_attention_2" and stage.resources.device == "cpu":
        yield "model.attention flash_attention_2 needs a GPU; use sdpa"
    if method != "full" and not inputs.model.has_weights and stage.of is None:
        yield (
            f"adapter.method {method} trains beside pretrained weights, but the model "
            "starts from random ones; use adapter=full or a trained model"
        )
    if method != "full" and view.model.freeze:
        yield "model.freeze has no meaning with an adapter, which freezes the whole base; leave one of them out"
    experts = next(
        (config[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(name)), None
    )
    if method == "qlora" and zero.stage == 3 and experts:
        yield (
            f"adapter qlora with zero.stage 3 fails on a mixture of {experts} "
            "experts: ZeRO-3 waits for experts that got no token; "
            "use zero.stage 2, or adapter=lora"
        )
    if zero.offload != "none" and zero.stage == 0:
        yield f"train.zero.offload {zero.offload} needs zero.stage 1 to 3"
    if zero.offload == "both" and zero.stage != 3:
        yield "train.zero.offload both moves parameters to host memory, which only zero.stage 3 shards; use optimizer"
    if zero.offload != "none" and stage.resources.device == "cpu":
        yield "train.zero.offload has no meaning on a CPU, where all is in host memory; use none"
    if train.optimizer != "adamw" and zero.stage:
        yield f"train.optimizer {train.optimizer} is not supported with ZeRO here; use adamw or zero.stage 0"


def _storage_refusals(recipe: Recipe, found: Forecast, inputs: Inputs) -> Iterator[str]:
    free = inputs.room.free_bytes
    budget = recipe.checkpoints.budget_gb
    checkpoints = sum(line.num_bytes for line in found.storage if line.what.startswith("checkpoints"))
    if found.storage_peak_bytes > free:
        largest = max(found.storage, key=lambda line: line.num_bytes)
        yield (
            f"no room: the run will hold {found.storage_peak_bytes:,} bytes at "
            f"its peak and {inputs.room.folder} can take {free:,}; "
            f"the largest part is {largest.what} with {largest.num_bytes:,}: "
            "keep fewer (checkpoints.keep_best=0 halves them), "
            "or choose another folder with --runs"
        )
    if budget is not None and checkpoints > budget * 1e9:
        yield (
            f"checkpoints.budget_gb is {budget:g}, but checkpoints will hold "
            f"{checkpoints / 1e9:.3g} GB at their peak; keep fewer or allow more"
        )


def _warnings(recipe: Recipe, site: Site, inputs: Inputs, stages: list[Stage], found: Forecast) -> Iterator[str]:
    for stage in stages:
        lines = found.device.get(stage.name, ())
        total = sum(line.num_bytes for line in lines)
        room = site.gpu_memory_bytes if stage.resources.device == "gpu" else site.memory_bytes
        ranks = (
            1
            if stage.resources.device == "gpu" or site.launcher != "local"
            else stage.resources.nodes * stage.resources.devices_per_node
        )
        if total * ranks > room > 0:
            yield (
                f"stage {stage.name!r} will want {total / 1e9:.1f} GB a rank "
                f"and there are {room / ranks / 1e9:.1f} GB; "
                "a smaller micro_batch, gradient_checkpointing or a higher zero.stage takes less"
            )
        cores = stage.resources.cpus_per_device * stage.resources.devices_per_node * stage.resources.nodes
        if stage.kind == "train" and site.launcher == "local" and cores > site.cpus_per_node:
            yield (
                f"stage {stage.name!r} asks for {cores} cores and {site.name} "
                f"has {site.cpus_per_node}: ranks will take turns"
            )
