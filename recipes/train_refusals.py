"""Refuse settings of a training that cannot work, or would do nothing.

Pure. Each reason says what to set instead. What an engine or a task refuses is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

from .facts import Inputs, ModelFacts
from .fallbacks import fallback_refusals
from .forecast.parameters import is_frozen
from .plan import Stage
from .schema import StageSettings
from .tasks import task_of

_LEAST_FLOAT16 = 6e-8  # smaller numbers round to 0


def train_refusals(stage: Stage) -> Iterator[str]:
    """Yield each reason why the settings of a train stage do not work together."""
    train = stage.settings.train
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
