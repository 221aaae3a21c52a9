"""Refuse settings of a training that cannot work, or would do nothing.

Pure. Each reason says what to set instead. What an engine or a task refuses is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

from .plan import Stage
from .tasks import task_of


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


def train_warnings(stage: Stage) -> Iterator[str]:
    """Yield what a train stage will do that may not be meant."""
    batch = stage.batch
    if batch is not None and batch.warmup_steps >= batch.steps:
        yield (
            f"stage {stage.name!r}: the warm-up of {batch.warmup_steps} steps is as long as the training, "
            f"{batch.steps} steps: the highest rate is not reached before its end"
        )
