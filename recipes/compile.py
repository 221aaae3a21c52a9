"""Compile a recipe, a site and the inputs into a plan.

Pure: it reads no disk, clock or environment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..cluster.site import Site
from ..errors import PlanError
from .data.row_faults import unknown_warnings
from .decodings import decoded, idle_keys
from .engines import engine_of
from .facts import Inputs, ModelFacts
from .forecast.memory import forecast, host_memory
from .forecast.parameters import merge_bytes, training_key
from .forecast.prediction import memory_refusals
from .forecast.storage import is_own_limit, model_of, with_dtype
from .generation import engine_refusals
from .labels import with_labels
from .model_kinds import overflows_in_float16, reads_padding
from .optimizers import optimizer_refusals
from .plan import After, Batch, Forecast, Plan, Stage, StageModel, StageSplit
from .publications import unpublished
from .refusals import by_stage, card_refusals, doubts, misfits, node_memory, rank_memory
from .schema import Recipe, StageSettings
from .stages import ResolvedStage, RowsWanted, resolve_stages, with_tokens
from .tasks import task_of, with_metrics
from .train_refusals import train_refusals, train_warnings

_MANY_ANSWERS = 500  # generated while all ranks wait
_TASK_BYTES = 40_000_000_000  # of the consolidated model: 120 GB move, 2 minutes at 1 GB/s


def compile(recipe: Recipe, site: Site, inputs: Inputs) -> Plan:
    """Return the plan of *recipe* at *site*: the same value for the same arguments.

    Raises:
        PlanError: every reason why it cannot work.
    """
    recipe = with_labels(with_tokens(recipe, inputs.tokens), inputs.labels)
    recipe = with_metrics(with_dtype(recipe, inputs.model))
    resolved = [*resolve_stages(recipe).values()]
    stages = [_stage(one, resolved[:number], site, inputs) for number, one in enumerate(resolved)]
    reasons = list(by_stage(stages, misfits, site))
    for stage in stages:
        for one in decoded(stage).values():
            reasons += _refusals(one, inputs)
        reasons += _merge_refusals(stage, site, inputs)
        reasons += memory_refusals(stage, site, inputs)
        reasons += card_refusals(stage, site) if stage.batch is not None else ()
    if reasons:
        raise PlanError(list(dict.fromkeys(reasons)))
    found = forecast(inputs, stages)
    reasons += _storage_refusals(stages, found, inputs)
    if reasons:
        raise PlanError(reasons)
    warnings = [*by_stage(stages, doubts, site), *_token_warnings(inputs), *unpublished(recipe, stages)]
    warnings += _unused(stages)
    warnings += [warning for stage in stages for warning in _warnings(recipe, site, inputs, stage, found)]
    return Plan(
        recipe=recipe,
        site=site,
        inputs=inputs,
        stages=tuple(stages),
        forecast=found,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _stage(found: ResolvedStage, above: Sequence[ResolvedStage], site: Site, inputs: Inputs) -> Stage:
    splits = {rows.use: _split(found.name, rows, inputs) for rows in found.rows}
    return Stage(
        name=found.name,
        kind=found.kind.name,
        of=found.of,
        resources=found.resources,
        settings=_settings(found.settings, inputs.model),
        model=stage_model(inputs.model, found.model_stage),
        train_stage=found.train_stage,
        predict_stage=found.predict_stage,
        splits=splits,
        num_tasks=_num_tasks(found, site, inputs),
        after=_after(found, above),
        batch=_batch(found, splits["train"].num_examples) if found.kind.leaves == "checkpoints" else None,
    )


def _settings(settings: StageSettings, model: ModelFacts) -> StageSettings:
    """Return *settings* without the fallback that the model cannot do."""
    trained, left = model.trained.get(training_key(settings)), settings.train.on_out_of_memory
    if trained is None or trained.recomputes:
        return settings
    left = tuple(name for name in left if name != "gradient_checkpointing")
    return replace(settings, train=replace(settings.train, on_out_of_memory=left))


def _after(found: ResolvedStage, above: Sequence[ResolvedStage]) -> tuple[After, ...]:
    """Return what must have ended before a stage.

    That is what it works on; a kind that waits for all also waits for the ends of what is above it.
    """
    own = (After(stage=found.of, condition=found.kind.after),) if found.of else ()
    if not found.kind.waits_for_all:
        return own
    worked_on = {one.of for one in (*above, found)}
    return (*own, *(After(stage=one.name) for one in above if one.name not in worked_on))


def stage_model(model: ModelFacts, made_by: str | None) -> StageModel:
    """Return the model of the stage *made_by*, or the recipe's *model* without one."""
    return StageModel(
        made_by=made_by,
        folder=model.folder,
        tokenizer_folder=model.tokenizer_folder,
        digest=model.digest,
        has_weights=model.has_weights,
    )


def _split(stage: str, rows: RowsWanted, inputs: Inputs) -> StageSplit:
    facts = inputs.split_of(stage, rows.use, rows.split)
    lengths = None if rows.use == "score" else inputs.lengths_of(stage, rows.use)
    num_rows = rows.num_rows(facts.num_rows)
    return StageSplit(
        name=rows.split,
        path=facts.path,
        digest=facts.digest,
        num_rows=num_rows,
        num_examples=lengths.num_examples if lengths else num_rows,
    )


def _num_tasks(found: ResolvedStage, site: Site, inputs: Inputs) -> int:
    """Return how many tasks share a stage.

    The tasks of a consolidation share weight files, so there are no more tasks than files.
    """
    settings, tasks = found.settings, found.resources.tasks
    if found.kind.shares == "rows":
        return tasks or 1
    # to fall back to bfloat16 concerns all files at once: one task decides
    if found.kind.shares != "weight files" or settings.consolidate.overflow == "bfloat16":
        return 1
    num_bytes = model_of(settings, inputs.model).num_bytes
    files = math.ceil(num_bytes / (settings.consolidate.max_shard_gb * 1e9))
    return min(files, tasks or (math.ceil(num_bytes / _TASK_BYTES) if not site.is_one_machine else 1))


def _batch(found: ResolvedStage, num_examples: int) -> Batch:
    train, resources = found.settings.train, found.resources
    ranks = resources.nodes * resources.devices_per_node
    steps_per_epoch = max(1, math.ceil(num_examples / train.global_batch))
    steps = train.steps or math.ceil(train.epochs * steps_per_epoch)
    warmup = train.schedule.warmup_steps
    return Batch(
        world_size=ranks,
        micro_batch=train.micro_batch,
        accumulation=max(1, train.global_batch // (ranks * train.micro_batch)),
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup if warmup is not None else math.ceil(train.schedule.warmup_ratio * steps),
        save_every_steps=min(steps, _save_every(found.settings, steps, steps_per_epoch)),
    )


def _save_every(settings: StageSettings, steps: int, steps_per_epoch: int) -> int:
    spec = settings.checkpoints
    if spec.every_steps is None and spec.every_epochs is not None:
        return max(1, round(spec.every_epochs * steps_per_epoch))
    return spec.every_steps or max(1, steps // 10)


def _refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    settings = stage.settings
    if "score" in stage.splits:  # without answers there is nothing to compare with
        yield from task_of(settings.task).refusals(stage, inputs)
    if not stage.uses_devices:
        return
    if stage.resources.device == "cpu":
        yield from _cpu_refusals(settings, stage)
    elif settings.model.attention == "flash_attention_2":
        yield from _flash_refusals(settings, stage, inputs)
    yield from task_of(settings.task).refusals(stage, inputs)
    yield from engine_refusals(stage, inputs)
    if stage.batch is not None:
        yield from _batch_refusals(settings, stage, stage.batch)
        yield from train_refusals(stage, inputs.model)
        yield from optimizer_refusals(stage, inputs.versions)
        yield from engine_of(settings).refusals(settings, inputs.model)
        yield from _parameter_refusals(settings, stage)
    elif stage.record.starts_from_model and stage.model.is_random:
        why = "model.from_scratch is true" if settings.model.from_scratch else "model.path has no weights"
        yield f"stage {stage.name!r} has no model: no consolidate stage above it, and {why}"
    elif stage.record.starts_from_model and stage.model.made_by is None:
        yield from _head_refusals(stage, inputs)


def _head_refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Refuse to ask a model whose head was never trained."""
    task = task_of(stage.settings.task)
    architectures = ", ".join(map(str, inputs.model.config.get("architectures") or ["no class"]))
    if task.has_new_head and task.model_class.removeprefix("AutoModel") not in architectures:
        yield (
            f"stage {stage.name!r}: the model was not trained for task {task.name} (it is {architectures}), so its "
            "answers would be random; train it in this recipe, or name a model that was"
        )


def _merge_refusals(stage: Stage, site: Site, inputs: Inputs) -> Iterator[str]:
    """Refuse an adapter that can be merged in memory only, where that is too small."""
    needed = merge_bytes(stage.settings, inputs.model) if stage.record.leaves == "model" else 0
    if needed > (there := node_memory(stage, site)) > 0:
        yield (
            f"stage {stage.name!r}: this adapter can be merged in memory only, which takes {_gb(needed)}, and a node "
            f"has {_gb(there)}; name layers of the attention alone in adapter.target_modules, or more memory in "
            f"resources.{stage.name}.memory_gb"
        )


def _cpu_refusals(settings: StageSettings, stage: Stage) -> Iterator[str]:
    if settings.model.attention == "flash_attention_2":
        yield "model.attention flash_attention_2 needs a GPU; set model.attention=sdpa"
    if stage.batch is not None and settings.train.precision == "float16":
        yield "train.precision float16 does not train on a CPU; set train.precision=bfloat16 or train.precision=float32"
    if stage.batch is not None and settings.train.zero.offload != "none":
        yield "train.zero.offload has no meaning on a CPU, where all is in host memory; set train.zero.offload=none"


def _flash_refusals(settings: StageSettings, stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Refuse flash attention in float32, and where it is not installed."""
    if inputs.versions and not {"flash_attn", "kernels"} & inputs.versions.keys():
        yield (
            "model.attention flash_attention_2 needs the package flash-attn; pip install flash-attn, or set "
            "model.attention=sdpa"
        )
    key, dtype = (
        ("train.precision", settings.train.precision) if stage.batch else ("predict.dtype", settings.predict.dtype)
    )
    if dtype == "float32":
        yield f"model.attention flash_attention_2 cannot compute in float32; set {key}=bfloat16 or model.attention=sdpa"


def _batch_refusals(settings: StageSettings, stage: Stage, batch: Batch) -> Iterator[str]:
    wanted, rows_at_once = settings.train.global_batch, batch.world_size * batch.micro_batch
    if wanted % rows_at_once:
        lower = wanted // rows_at_once * rows_at_once
        near = [f"train.global_batch={number}" for number in (lower, lower + rows_at_once) if number]
        yield (
            f"stage {stage.name!r}: train.global_batch {wanted} is not divided by {batch.world_size} ranks x "
            f"train.micro_batch {batch.micro_batch}; set {' or '.join(near)}"
        )


def _parameter_refusals(settings: StageSettings, stage: Stage) -> Iterator[str]:
    """Refuse methods that do not fit together.

    The names in them were checked when the model was built.
    """
    method = settings.adapter.method
    if method != "full":
        if stage.model.is_random:
            yield (
                f"adapter.method {method} trains beside pretrained weights, but the model starts from random ones; "
                "set adapter=full, or take a trained model"
            )
        if settings.model.freeze:
            yield (
                "model.freeze has no meaning with an adapter, which freezes the whole base; set model.freeze=[] or "
                "adapter=full"
            )


def _storage_refusals(stages: Sequence[Stage], found: Forecast, inputs: Inputs) -> Iterator[str]:
    """Refuse a run whose checkpoints do not fit, even as weights alone."""
    space = inputs.disk_space
    where = f"{space.folder} can take {_gb(max(0, space.free_bytes))} ({space.source})"
    largest = max(found.storage, key=lambda line: line.num_bytes)
    for name, kept in found.checkpoints.items():
        settings = next(stage.settings for stage in stages if stage.name == name)
        if kept.fits and kept.save_level == "none" and settings.checkpoints.keep_steps:
            steps = ", ".join(map(str, settings.checkpoints.keep_steps))
            yield f"not enough space for the checkpoints of steps {steps} of stage {name!r}: {kept.change}"
        if kept.fits:
            continue
        what = f"not enough space: not even the weights of stage {name!r}, {_gb(kept.least_bytes)}, fit into"
        if is_own_limit(settings, kept.free_bytes):
            yield f"{what} checkpoints.budget_gb={kept.free_bytes / 1e9:g}: {kept.change}"
            continue
        yield (
            f"{what} the {_gb(max(0, kept.free_bytes))} left for them; {where} and the run will hold "
            f"{_gb(found.storage_peak_bytes)}, the largest part is {largest.what}: {kept.change}, or another folder "
            "with --runs"
        )
    if not found.checkpoints and found.storage_peak_bytes > space.free_bytes:
        yield (
            f"not enough space: the run will hold {_gb(found.storage_peak_bytes)} and {where}; the largest part is "
            f"{largest.what}: choose another folder with --runs"
        )


def _token_warnings(inputs: Inputs) -> Iterator[str]:
    tokens = inputs.tokens
    if tokens is not None and tokens.after >= tokens.before:
        yield (
            f"model.add_tokens_from {tokens.source!r} makes no row shorter: {tokens.before:g} tokens a row before and "
            f"{tokens.after:g} after; this tokenizer has words that the new tokens cut"
        )


def _unused(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield each train stage that begins anew below a model that no stage takes."""
    taken = {stage.of for stage in stages}
    for number, stage in enumerate(stages):
        above = [one.name for one in stages[:number] if one.record.leaves == "model"]
        if stage.record.leaves == "checkpoints" and stage.of is None and above and above[-1] not in taken:
            yield (
                f"stage {stage.name!r} starts from model.path, and no stage takes the model of {above[-1]!r}: to go on "
                f"from that, set stages.{stage.name}.of={above[-1]}"
            )


def _storage_warnings(stage: Stage, found: Forecast) -> Iterator[str]:
    does = {
        "full": "two full states and the weights of the best one will be kept",
        "weights": "only weights will be saved, and a kill starts training again",
        "none": "only the weights at the end will be saved, and a kill starts training again",
    }
    kept = found.checkpoints[stage.name]
    if not kept.keeps_all:
        yield (
            f"stage {stage.name!r} would hold {_gb(kept.full_bytes)} of checkpoints and {_gb(kept.free_bytes)} are "
            f"there: {does[kept.save_level]}; smallest change: {kept.change}"
        )


def _float16_key(stage: Stage) -> str:
    """Return the key that has the stage compute in, or write, float16.

    Return an empty text where none has.
    """
    settings = stage.settings
    if stage.batch is not None:
        return "train.precision" if settings.train.precision == "float16" else ""
    if stage.record.leaves == "model":
        return "consolidate.dtype" if settings.consolidate.dtype == "float16" else ""
    return "predict.dtype" if "predict" in stage.splits and settings.predict.dtype == "float16" else ""


def _warnings(recipe: Recipe, site: Site, inputs: Inputs, stage: Stage, found: Forecast) -> Iterator[str]:
    yield from _slurm_only(recipe, site)
    for one in decoded(stage).values():
        yield from task_of(stage.settings.task).warnings(one, inputs)
    yield from unknown_warnings(stage, inputs)
    yield from _escape_warnings(stage)
    if "predict" in stage.splits and (idle := idle_keys(stage.settings)):
        yield (
            f"stage {stage.name!r}: task {stage.settings.task} generates no text, so {' and '.join(idle)} "
            f"{'do' if len(idle) > 1 else 'does'} nothing"
        )
    if overflows_in_float16(inputs.model.config) and (key := _float16_key(stage)):
        yield (
            f"stage {stage.name!r}: {key}=float16 for a {inputs.model.config.get('model_type')} model, which computes "
            f"values beyond float16's range; set {key}=bfloat16"
        )
    yield from _output_warnings(stage, inputs)
    if stage.batch is None:
        return
    yield from train_warnings(stage, inputs)
    if reads_padding(inputs.model.config, stage.settings.data.max_tokens) and stage.batch.micro_batch > 1:
        yield (
            f"stage {stage.name!r}: a {inputs.model.config['model_type']} reads the padding of the rows beside a row, "
            "and answers each row alone; train.micro_batch=1 trains it as it will be asked"
        )
    yield from _storage_warnings(stage, found)
    if "predict" in stage.splits and (num_rows := stage.splits["predict"].num_rows) > _MANY_ANSWERS:
        if task_of(stage.settings.task).generates:
            yield (
                f"stage {stage.name!r} generates {num_rows:,} answers each time it measures "
                f"{stage.settings.checkpoints.metric}; train.metric_rows={_MANY_ANSWERS} takes less"
            )
    wanted, ranks = stage.resources, stage.resources.nodes * stage.resources.devices_per_node
    total, there = sum(line.num_bytes for line in found.device[stage.name]), rank_memory(stage, site)
    if total > there > 0:
        yield (
            f"stage {stage.name!r} will want {_gb(total)} a rank and there are {_gb(there)}; `sousbatch plan --fit` "
            "finds settings that take less"
        )
    offloaded = host_memory(stage.settings, inputs.model, stage.batch) * ranks
    per_node = offloaded // (1 if site.is_one_machine else wanted.nodes)
    if per_node > node_memory(stage, site):
        yield (
            f"stage {stage.name!r} will offload {_gb(per_node)} to the host memory of a node, which has "
            f"{_gb(node_memory(stage, site))}"
        )
    cores = wanted.cpus_per_device * ranks
    if site.is_one_machine and cores > site.cpus_per_node:
        yield (
            f"stage {stage.name!r} asks for {cores} cores and {site.name} has {site.cpus_per_node}: "
            "ranks will take turns"
        )


def _escape_warnings(stage: Stage) -> Iterator[str]:
    """Warn of new lines that stayed a backslash and a letter on their way here."""
    data, predict = stage.settings.data, stage.settings.predict
    texts = {"data.prompt": [data.prompt], "data.separator": [data.separator], "data.system": [data.system or ""]}
    for key, given in {**texts, "predict.stop": predict.stop}.items():
        if any("\\n" in text for text in given):
            yield (
                f"{key} has a backslash and an n, and no new line: write it in double quotes in the recipe's file, or "
                f"on the command line as $'{key}=\"...\\n...\"'"
            )


def _output_warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    output, split = stage.settings.predict.output, stage.splits.get("predict")
    if stage.record.leaves != "predictions" or output is None or output.template is None or split is None:
        return
    if split.num_rows < (there := inputs.split_of(stage.name, "predict", split.name).num_rows):
        yield (
            f"stage {stage.name!r} predicts {split.num_rows:,} of {there:,} rows, and predict.output will have those "
            f"of template {output.template} alone, without its other rows; leave out predict.rows for a file to hand in"
        )


def _gb(num_bytes: float) -> str:
    value = num_bytes / 1e9
    return f"{value:,.0f} GB" if abs(value) >= 1000 else f"{value:.3g} GB"


def _slurm_only(recipe: Recipe, site: Site) -> Iterator[str]:
    """Warn of what only Slurm keeps."""
    words = ("partition", "account", "qos", "constraint", "exclude", "reservation", "sbatch")
    asked = {f"resources {word}" for wanted in recipe.resources.values() for word in words if getattr(wanted, word)}
    if recipe.environment.container:
        asked.add("environment.container")
    if asked and site.is_one_machine:
        yield f"{', '.join(sorted(asked))}: only Slurm keeps these; they do nothing on {site.name}"
