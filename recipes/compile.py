"""Compile a recipe, a site and the inputs into a plan. Pure: no disk, clock or environment."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..cluster.site import Site
from ..errors import PlanError
from .engines import engine_of
from .forecast.memory import forecast
from .forecast.parameters import takes_adapter
from .forecast.storage import is_own_limit, model_of, with_dtype
from .forecast.trainable import is_frozen
from .plan import After, Batch, Forecast, Inputs, Plan, Stage
from .refusals import by_stage, doubts, misfits
from .schema import Kind, Recipe, Resources
from .schema.fields import unbuilt
from .stages import kind_of, resources_of, source_of, stage_view, stages_of
from .tasks import task_of

_TASK_BYTES = 40_000_000_000  # of the consolidated model: 120 GB move, 2 minutes at 1 GB/s


def compile(recipe: Recipe, site: Site, inputs: Inputs) -> Plan:
    """Return the plan of *recipe* at *site*: the same value for the same arguments.

    Raises:
        PlanError: every reason why it cannot work.
    """
    recipe = with_dtype(recipe, inputs.model)
    stages = [_stage(recipe, name, site, inputs) for name in stages_of(recipe)]
    reasons = list(by_stage(stages, misfits, site))
    for stage in stages:
        reasons += _refusals(stage_view(recipe, stage.name), stage, inputs)
    if reasons:
        raise PlanError(list(dict.fromkeys(reasons)))
    found = forecast(recipe, inputs, stages)
    reasons += _storage_refusals(recipe, found, inputs)
    if reasons:
        raise PlanError(reasons)
    warnings = list(by_stage(stages, doubts, site))
    warnings += [warning for stage in stages for warning in _warnings(recipe, site, inputs, stage, found)]
    return Plan(
        recipe=recipe,
        site=site,
        inputs=inputs,
        stages=tuple(stages),
        forecast=found,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _stage(recipe: Recipe, name: str, site: Site, inputs: Inputs) -> Stage:
    kind, of, resources = kind_of(recipe, name), source_of(recipe, name), resources_of(recipe, name)
    # merge runs however the predictions ended, so that what is missing gets reported
    after = (After(stage=of, condition="any" if kind == "merge" else "ok"),) if of else ()
    return Stage(
        name=name,
        kind=kind,
        of=of,
        resources=resources,
        num_tasks=_num_tasks(stage_view(recipe, name), kind, resources, site, inputs),
        after=after,
        batch=_batch(stage_view(recipe, name), name, resources, inputs) if kind == "train" else None,
    )


def _num_tasks(view: Recipe, kind: Kind, resources: Resources, site: Site, inputs: Inputs) -> int:
    """Return how many tasks share a stage. Those of a consolidation share weight files, so no more than there are."""
    if kind == "predict":
        return resources.tasks or 1
    # to fall back to bfloat16 concerns all files at once: one task decides
    if kind != "consolidate" or view.consolidate.overflow == "bfloat16":
        return 1
    num_bytes = model_of(view, inputs.model).num_bytes
    files = math.ceil(num_bytes / (view.consolidate.max_shard_gb * 1e9))
    return min(files, resources.tasks or (math.ceil(num_bytes / _TASK_BYTES) if site.launcher == "slurm" else 1))


def _batch(view: Recipe, name: str, resources: Resources, inputs: Inputs) -> Batch:
    lengths = inputs.lengths_of(name, "train")
    num_rows = lengths.num_kept if lengths else inputs.splits[view.train.split].num_rows
    train, ranks = view.train, resources.nodes * resources.devices_per_node
    steps_per_epoch = max(1, math.ceil(num_rows / train.global_batch))
    steps = train.steps or math.ceil(train.epochs * steps_per_epoch)
    return Batch(
        world_size=ranks,
        micro_batch=train.micro_batch,
        accumulation=max(1, train.global_batch // (ranks * train.micro_batch)),
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=math.ceil(train.schedule.warmup_ratio * steps),
        save_every_steps=min(steps, view.checkpoints.every_steps or max(1, steps // 10)),
    )


def _refusals(view: Recipe, stage: Stage, inputs: Inputs) -> Iterator[str]:
    if not stage.uses_devices:
        return
    for key in unbuilt(view):
        yield f"{key} can be written down but is not done by this version; leave it out"
    if stage.resources.device == "cpu":
        yield from _cpu_refusals(view, stage)
    yield from task_of(view.task).refusals(view, stage, inputs)
    if stage.batch is not None:
        yield from _batch_refusals(view, stage, stage.batch)
        yield from engine_of(view).refusals(view, inputs.model)
        yield from _parameter_refusals(view, stage, inputs)
    elif stage.of is None and not inputs.model.has_weights:
        yield f"stage {stage.name!r} has no model: no consolidate stage above it, and model.path has no weights"


def _cpu_refusals(view: Recipe, stage: Stage) -> Iterator[str]:
    if view.model.attention == "flash_attention_2":
        yield "model.attention flash_attention_2 needs a GPU; set model.attention=sdpa"
    if stage.kind == "train" and view.train.precision == "float16":
        yield "train.precision float16 does not train on a CPU; set train.precision=bfloat16 or train.precision=float32"
    if stage.kind == "train" and view.train.zero.offload != "none":
        yield "train.zero.offload has no meaning on a CPU, where all is in host memory; set train.zero.offload=none"


def _batch_refusals(view: Recipe, stage: Stage, batch: Batch) -> Iterator[str]:
    wanted, rows_at_once = view.train.global_batch, batch.world_size * batch.micro_batch
    if wanted % rows_at_once:
        lower = wanted // rows_at_once * rows_at_once
        near = [f"train.global_batch={number}" for number in (lower, lower + rows_at_once) if number]
        yield (
            f"stage {stage.name!r}: train.global_batch {wanted} is not divided by {batch.world_size} ranks x "
            f"train.micro_batch {batch.micro_batch}; set {' or '.join(near)}"
        )


def _parameter_refusals(view: Recipe, stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Refuse what would train nothing, or not what was meant."""
    method, freeze, tensors = view.adapter.method, view.model.freeze, inputs.model.tensors
    if method != "full":
        if not inputs.model.has_weights and stage.of is None:
            yield (
                f"adapter.method {method} trains beside pretrained weights, but the model starts from random ones; "
                "set adapter=full, or take a trained model"
            )
        if freeze:
            yield (
                "model.freeze has no meaning with an adapter, which freezes the whole base; set model.freeze=[] or "
                "adapter=full"
            )
        heads = task_of(view.task).head_modules
        for target in view.adapter.target_modules:
            if not any(takes_adapter(tensor, target, heads) for tensor in tensors):
                linear = {t.name.removesuffix(".weight").rsplit(".", 1)[-1] for t in tensors if len(t.shape) == 2}
                yield f"adapter.target_modules: no layer is called {target!r}; known: {', '.join(sorted(linear))}"
        return
    for pattern in freeze:
        if not any(is_frozen(tensor.name, [pattern]) for tensor in tensors):
            yield f"model.freeze: no parameter matches {pattern!r}; they are called like {tensors[0].name}"
    if all(is_frozen(tensor.name, freeze) for tensor in tensors):
        yield f"model.freeze {list(freeze)} leaves nothing to train; set model.freeze=[]"


def _storage_refusals(recipe: Recipe, found: Forecast, inputs: Inputs) -> Iterator[str]:
    """Refuse what cannot even keep its weights; everything above is a rung of the ladder."""
    room = inputs.room
    where = f"{room.folder} can take {_gb(max(0, room.free_bytes))} ({room.source})"
    largest = max(found.storage, key=lambda line: line.num_bytes)
    for name, ladder in found.ladders.items():
        if ladder.fits:
            continue
        what = f"no room: not even the weights of stage {name!r}, {_gb(ladder.least_bytes)}, fit into"
        if is_own_limit(stage_view(recipe, name), ladder.room_bytes):
            yield f"{what} checkpoints.budget_gb={ladder.room_bytes / 1e9:g}: {ladder.change}"
            continue
        yield (
            f"{what} the {_gb(max(0, ladder.room_bytes))} left for them; {where} and the run will hold "
            f"{_gb(found.storage_peak_bytes)}, the largest part is {largest.what}: {ladder.change}, or another folder "
            "with --runs"
        )
    if not found.ladders and found.storage_peak_bytes > room.free_bytes:
        yield (
            f"no room: the run will hold {_gb(found.storage_peak_bytes)} and {where}; the largest part is "
            f"{largest.what}: choose another folder with --runs"
        )


def _storage_warnings(stage: Stage, found: Forecast) -> Iterator[str]:
    does = {
        "thinned best": "two full states and the weights of the best one will be kept",
        "weights only": "only weights will be saved, and a kill starts training again",
        "none": "only the weights at the end will be saved, and a kill starts training again",
    }
    ladder = found.ladders[stage.name]
    if ladder.rung != "full":
        yield (
            f"stage {stage.name!r} would hold {_gb(ladder.full_bytes)} of checkpoints and {_gb(ladder.room_bytes)} are "
            f"there: {does[ladder.rung]}; smallest change: {ladder.change}"
        )


def _warnings(recipe: Recipe, site: Site, inputs: Inputs, stage: Stage, found: Forecast) -> Iterator[str]:
    yield from _slurm_only(recipe, site)
    view = stage_view(recipe, stage.name)
    yield from task_of(view.task).warnings(view, stage, inputs)
    if stage.kind != "train":
        return
    yield from _storage_warnings(stage, found)
    wanted, ranks = stage.resources, stage.resources.nodes * stage.resources.devices_per_node
    total = sum(line.num_bytes for line in found.device[stage.name])
    room = site.gpu_memory_bytes
    if wanted.device == "cpu":
        room = site.memory_bytes // (ranks if site.launcher == "local" else wanted.devices_per_node)
    if total > room > 0:
        yield (
            f"stage {stage.name!r} will want {_gb(total)} a rank and there are {_gb(room)}; "
            "a smaller micro_batch, gradient_checkpointing or a higher zero.stage takes less"
        )
    cores = wanted.cpus_per_device * ranks
    if site.launcher == "local" and cores > site.cpus_per_node:
        yield (
            f"stage {stage.name!r} asks for {cores} cores and {site.name} has {site.cpus_per_node}: "
            "ranks will take turns"
        )


def _gb(num_bytes: float) -> str:
    value = num_bytes / 1e9
    return f"{value:,.0f} GB" if abs(value) >= 1000 else f"{value:.3g} GB"


def _slurm_only(recipe: Recipe, site: Site) -> Iterator[str]:
    """Name what was asked for and is Slurm's to give: a time limit that is not kept would surprise."""
    words = ("memory_gb", "time_min", "partition", "account", "qos", "constraint", "exclude", "reservation", "sbatch")
    asked = {f"resources {word}" for wanted in recipe.resources.values() for word in words if getattr(wanted, word)}
    if recipe.environment.container:
        asked.add("environment.container")
    if asked and site.launcher == "local":
        yield f"{', '.join(sorted(asked))}: Slurm keeps these, and they do nothing on {site.name}"
