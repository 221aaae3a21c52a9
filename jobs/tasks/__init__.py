"""The runtime of each task in a job.

It is the runtime half of what `recipes.tasks` describes. A task's module calls its record RUNTIME. It may import torch
and transformers; this one does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import UsageError
from ...recipes.data.rows import Row
from ...recipes.tasks import TaskSpec, task_of
from ..context import importing

if TYPE_CHECKING:
    from ...recipes.schema import StageSettings


IGNORED_LABEL = -100  # of tokens that count in no loss, as torch's cross entropy says it


class Examples(Protocol):
    """The examples of a split, as a Trainer takes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Answerer(Protocol):
    """A loaded model, saved or in training, that answers rows."""

    def answer(self, rows: Sequence[tuple[int, Row]]) -> list[dict[str, Any]]:
        """Return the fields of each row's prediction.

        The rows come as (position in the file, row) pairs, and the predictions in their order.
        """


class Loss(Protocol):
    """A loss as transformers' Trainer calls it."""

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """Return the mean loss over the labels that count.

        Of a step that is summed up over several batches, *num_items_in_batch* is the number of all its labels.
        """


@dataclass(frozen=True, kw_only=True)
class TaskRuntime:
    """The runtime half of a task."""

    # Returns the examples of a data file, from a tokenizer and the most rows.
    examples: Callable[[StageSettings, Path, Any, int | None], Examples]
    # Returns what makes a batch of tensors of some examples, from a tokenizer and the model that they are for.
    collator: Callable[[StageSettings, Any, Any], Callable[[Sequence[Any]], Mapping[str, Any]]]
    # Returns what answers rows, from a loaded model and a tokenizer; the model is an engine where the task generates.
    answerer: Callable[[StageSettings, Any, Any], Answerer]
    # Returns the loss of a model's outputs, from the examples that train; None leaves it to the model itself.
    loss: Callable[[StageSettings, Examples], Loss] | None = None


def runtime_of(task: TaskSpec) -> TaskRuntime:
    """Return the runtime half of *task*."""
    runtime = import_module(task.runtime).RUNTIME
    if not isinstance(runtime, TaskRuntime):
        raise UsageError(f"{task.runtime}.RUNTIME of task {task.name!r} is not a TaskRuntime")
    return runtime


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that a task answers with; an engine where the task generates."""

    task: TaskSpec
    model: Any
    tokenizer: Any

    def answerer(self, settings: StageSettings) -> Answerer:
        """Return what answers rows with other *settings* of `predict`."""
        model = self.model.with_settings(settings) if self.task.generates else self.model
        return runtime_of(self.task).answerer(settings, model, self.tokenizer)


def load_model(
    settings: StageSettings, model_dir: Path, tokenizer_dir: Path, device: str, dtype: str, num_devices: int = 1
) -> Loaded:
    """Return the model of *model_dir*, in *dtype*, on the devices that its task has."""
    with importing():
        from ..generation import LoadRequest, load_engine, transformers_engine
        from ..training.model import load_tokenizer

    task, tokenizer = task_of(settings.task), load_tokenizer(settings, tokenizer_dir)
    request = LoadRequest(
        settings=settings,
        model_dir=model_dir,
        tokenizer=tokenizer,
        model_class=task.model_class,
        device=device,
        dtype=dtype,
        num_devices=num_devices,
    )
    model: Any = load_engine(request) if task.generates else transformers_engine.load_model(request)
    return Loaded(task=task, model=model, tokenizer=tokenizer)
