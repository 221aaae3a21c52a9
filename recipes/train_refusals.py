"""Refuse settings of a training that cannot work, or would do nothing.

Pure. Each reason says what to set instead. What an engine or a task refuses is theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .facts import Inputs, ModelFacts
from .fallbacks import fallback_refusals
from .forecast.parameters import is_frozen
from .model_kinds import fails_cast_to_half, fails_in_mixed_precision, fails_loaded_in_half, layer_drops
from .plan import Stage
from .schema import StageSettings
from .tasks import task_of

_OF_ONE_EXPERT = re.compile(r"\bexperts\.(expert_)?\d+\.")
_LEAST_FLOAT16 = 6e-8  # smaller numbers round to 0


def train_refusals(stage: Stage, model: ModelFacts) -> Iterator[str]:
    """Yield why a train stage's settings do not work together, or with its model."""
    train, model_type = stage.settings.train, model.config.get("model_type")
    if train.precision != "float32":
        is_sharded, is_mixed = train.zero.stage > 0, train.zero.stage == 0 and train.master_weights
        fails = (is_sharded and fails_cast_to_half(model.config)) or (
            is_mixed and fails_in_mixed_precision(model.config)
        )
        if fails or (not train.master_weights and fails_loaded_in_half(model.config)):
            how = "" if is_mixed else ", with train.zero" if is_sharded else ", with train.master_weights=false"
            yield (
                f"train.precision {train.precision} fails on a {model_type}{how} (transformers 5.23); set "
                "train.precision=float32"
            )
    yield from _uneven_refusals(stage, model)
    if train.tf32 and stage.resources.device == "cpu":
        yield "train.tf32 has no effect on a CPU; set train.tf32=false"
    if train.label_smoothing and task_of(stage.settings.task).model_class.endswith("QuestionAnswering"):
        yield (
            f"train.label_smoothing has no effect on task {stage.settings.task}, whose answers are places in the text; "
            "set train.label_smoothing=0"
        )
    packing = stage.settings.data.packing
    if train.group_by_length and packing != "none":
        yield (
            f"train.group_by_length has no use with data.packing {packing}, which fills every example; set "
            "train.group_by_length=false"
        )
    if late := [step for step in stage.settings.checkpoints.keep_steps if step > stage.steps]:
        yield f"stage {stage.name!r} ends at step {stage.steps}, and the checkpoint of step {late[0]} is wanted"
    yield from fallback_refusals(stage)
    if not train.master_weights:
        yield from _pure_refusals(stage.settings)


def _uneven_refusals(stage: Stage, model: ModelFacts) -> Iterator[str]:
    """Refuse ZeRO for a model of which each rank calls other parts in a step.

    DeepSpeed exchanges the weights and gradients that a rank has, in the order in which they come: those of others
    would be mixed with them, or waited for.
    """
    zero = stage.settings.train.zero
    if zero.stage == 0 or stage.batch is None or stage.batch.world_size == 1:
        return
    if drops := layer_drops(model.config):
        yield (
            f"train.zero.stage {zero.stage} fails on a model that leaves out layers at random, as each rank leaves out "
            f"others; set {' '.join(f'model.config.{key}=0' for key in drops)}, or train.zero.stage=0"
        )
    if zero.stage < 3 and any(_OF_ONE_EXPERT.search(tensor.name) for tensor in model.tensors):
        yield (
            f"train.zero.stage {zero.stage} fails on a model whose experts are modules of their own, of which each "
            "rank calls others; set train.zero.stage=3, or train.zero.stage=0"
        )


def _unlearned(stage: Stage, model: ModelFacts) -> Iterator[str]:
    """Say so where all tables that get a row for each new token are frozen."""
    added, frozen = stage.settings.model.add_tokens, stage.settings.model.freeze
    if not (added and frozen):
        return
    words = model.config.get("vocab_size")
    tables = [one.name for one in model.tensors if len(one.shape) == 2 and one.shape[0] == words]
    if tables and all(is_frozen(name, frozen) for name in tables):
        yield (
            f"stage {stage.name!r}: model.freeze has {', '.join(tables)}, so that the rows of the {len(added)} new "
            "tokens stay the mean of the others; leave it out, and they are learned"
        )


def _pure_refusals(settings: StageSettings) -> Iterator[str]:
    """Yield why a training cannot do without float32 masters."""
    train, keep = settings.train, "set train.master_weights=true"
    if train.precision == "float32":
        yield f"train.master_weights=false has no meaning in float32; {keep} or train.precision=bfloat16"
    if settings.adapter.method != "full":
        yield f"train.master_weights=false has no meaning with an adapter, which is small; {keep} or adapter=full"
    if train.precision == "float16" and train.epsilon < _LEAST_FLOAT16:
        yield (
            f"train.epsilon {train.epsilon:g} is 0 in float16, so moments without masters would be divided by 0; set "
            f"train.epsilon=1e-6 or train.master_weights=true"
        )


def train_warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Yield what a train stage will do that may not be meant."""
    yield from _unlearned(stage, inputs.model)
    for one in inputs.prepared:
        for step in one.steps:
            if one.stage == stage.name and step.name.startswith("augment ") and not step.added:
                yield f"stage {stage.name!r}: {step.name.replace(' ', ' by ', 1)} made no row of split {one.split!r}"
    batch, optimizer = stage.batch, stage.settings.train.optimizer
    if optimizer in ("fused_adam", "cpu_adam"):
        yield (
            f"stage {stage.name!r}: train.optimizer {optimizer} is compiled at its first start, in 1 to 4 minutes; the "
            "node needs g++ and ninja"
        )
    if batch is not None and batch.warmup_steps >= batch.steps:
        yield (
            f"stage {stage.name!r}: the warm-up of {batch.warmup_steps} steps is as long as the training, "
            f"{batch.steps} steps: the highest rate is not reached before its end"
        )
