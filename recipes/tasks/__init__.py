"""What planning knows of each task.

There is one record per task, which says what sets the task apart. A task is two halves with one name. The pure half is
a record here; its runtime half is the module that the record names, which only the jobs import. Nothing else compares
the names of tasks.

To add a task: a `TaskSpec` in a file here, a `TaskRuntime` in jobs/tasks, one row in `TASKS`, and settings with rows in
tests/jobs/tasks/test_tasks.py. A third-party task is an entry point of the group `sousbatch.tasks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ...errors import Fault, UsageError
from ...plugins import Registry
from ...predictions.metrics import METRICS
from ..model_kinds import ModelKind, kind_of

if TYPE_CHECKING:
    from ..data.encode import Encoded
    from ..data.rows import Row
    from ..facts import Inputs
    from ..plan import Stage
    from ..schema import Recipe, StageSettings
    from ..stage_kinds import RowUse


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that the data must have. *named_by* is the recipe's key that names it."""

    named_by: str
    name: str
    may_nest: bool = False  # lists and objects are read as well as text


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The pure half of a task. No function here reads a file or imports torch.

    *version* is raised when the same settings and rows are encoded or answered in another way. *runtime* is the module
    of the other half. *model_class* is a class of transformers, *kinds* are those of the models that it fits, all
    where none is named, *peft_type* is a TaskType of peft, and *head_modules* are the linear layers that get no
    adapter from `all-linear`. *has_new_head* says that pretrained weights lack the head, *has_labels* that planning
    collects the labels of the target column into the model's config, *can_pack* that rows can share an example
    (`data.packing`).

    A task that *generates* lets an engine answer with tokens. *decides* lists the settings that decide a prediction
    besides those of the engine; *reads* lists the sections of the settings that *encode* reads. *fields* are what its
    answers add to the prediction, and *metrics* what is measured unless the recipe says otherwise.
    """

    name: str
    version: int
    runtime: str
    model_class: str
    kinds: tuple[ModelKind, ...] = ()
    peft_type: str
    head_modules: tuple[str, ...] = ()
    has_new_head: bool = False
    has_labels: bool = False
    can_pack: bool = False
    generates: bool
    decides: tuple[str, ...]
    reads: tuple[str, ...]
    fields: tuple[str, ...] = ()
    metrics: tuple[str, ...]
    # Yields what is wrong between keys of the recipe, for a stage that uses rows so.
    faults: Callable[[StageSettings, Sequence[RowUse]], Iterator[Fault]]
    # Returns the columns that a use of the rows reads.
    columns: Callable[[StageSettings, RowUse], Sequence[Column]]
    # Returns the most tokens that a row may have, from the model's config; None where there is no limit.
    longest: Callable[[StageSettings, RowUse, Mapping[str, Any]], int | None]
    # Returns the examples of some rows, in order, from a tokenizer and the most tokens.
    encode: Callable[[StageSettings, RowUse, Sequence[Row], Any, int | None], list[Encoded]]
    # Yield why a stage cannot work, and what will happen that may not be meant.
    refusals: Callable[[Stage, Inputs], Iterator[str]]
    warnings: Callable[[Stage, Inputs], Iterator[str]]
    # Returns the model's outputs for each token, from its config, and what they are called.
    outputs: Callable[[Mapping[str, Any]], tuple[int, str]]
    # Returns the bytes of one predicted row, and the formula.
    row_bytes: Callable[[StageSettings], tuple[int, str]]


OWN_TASKS = {
    "causal_lm": "recipes.tasks.causal_lm:TASK",
    "seq2seq": "recipes.tasks.seq2seq:TASK",
    "classification": "recipes.tasks.classification:TASK",
    "question_answering": "recipes.tasks.question_answering:TASK",
}
TASKS: Registry[TaskSpec] = Registry("task", "sousbatch.tasks", OWN_TASKS)


def task_of(name: str) -> TaskSpec:
    """Return the task called *name*.

    Raises:
        UsageError: there is none, or it is no TaskSpec.
    """
    task = TASKS.load(name)
    if not isinstance(task, TaskSpec) or task.name != name:
        raise UsageError(f"what is installed as task {name!r} is not a TaskSpec of that name")
    _check_keys(task)
    return task


@functools.cache
def _check_keys(task: TaskSpec) -> None:
    """Refuse a task that names settings which do not exist.

    Its jobs would fail after hours.
    """
    from ..schema import StageSettings

    for key in (*task.decides, *task.reads):
        try:
            attrgetter(key)(StageSettings())
        except AttributeError:
            raise UsageError(f"task {task.name!r} names the setting {key!r}, which no recipe has") from None


def misfit(task: TaskSpec, config: Mapping[str, Any]) -> str | None:
    """Return why *task* cannot take a model of *config*, None where it can."""
    kind = kind_of(config)
    if not task.kinds or kind in task.kinds:
        return None
    what = {"decoder": "a decoder", "encoder": "an encoder", "encoder-decoder": "an encoder-decoder"}
    takes = " or ".join(what[one] for one in task.kinds)
    return f"is {what[kind]} ({config.get('model_type')}), and task {task.name} takes {takes}"


def advise_task(config: Mapping[str, Any], is_there: Callable[[TaskSpec], bool] = lambda task: True) -> str:
    """Return which task to set for a model of *config*.

    *is_there* says whether the class of a task is.
    """
    tasks = [task for task in map(task_of, OWN_TASKS) if misfit(task, config) is None and is_there(task)]
    return f"set {' or '.join(f'task={task.name}' for task in tasks)}" if tasks else "take another model"


def with_metrics(recipe: Recipe) -> Recipe:
    """Return *recipe* with the metrics of its score stages.

    They are the task's where the recipe is silent.
    """
    if recipe.score.metrics:
        return recipe
    return replace(recipe, score=replace(recipe.score, metrics=task_of(recipe.task).metrics))


def _packing_faults(settings: StageSettings, task: TaskSpec) -> Iterator[Fault]:
    key, packing = "data.packing", settings.data.packing
    if not task.can_pack:
        yield Fault(
            key=key, problem=f"is {packing}, and examples of {task.name} are one row each", hint="set it to none"
        )
    elif packing == "blocks" and settings.data.prompt:
        hint = "set data.prompt='', or data.packing=rows"
        yield Fault(key=key, problem="is blocks, which joins plain text, and data.prompt has a template", hint=hint)
    if settings.train.group_by_length:
        yield Fault(
            key="train.group_by_length", problem=f"does nothing with data.packing={packing}", hint="leave it out"
        )


def task_faults(settings: StageSettings, uses: Sequence[RowUse]) -> Iterator[Fault]:
    """Yield what the task of the settings finds wrong in them."""
    task = task_of(settings.task)
    yield from task.faults(settings, uses)
    if settings.data.packing != "none" and "train" in uses:
        yield from _packing_faults(settings, task)
    if settings.train.class_weights and "train" in uses and not task.has_labels:
        hint = "leave it out, or set task=classification"
        yield Fault(key="train.class_weights", problem=f"has no effect on {task.name}, which has no labels", hint=hint)
    for number, name in enumerate(settings.score.metrics):
        if METRICS.is_path(name):
            continue  # it is looked at where it will run (`inspect.scorers`)
        if name not in task.metrics and (missing := set(METRICS.load(name).fields) - set(task.fields)):
            has = ", ".join(task.fields) or "none"
            problem = (
                f"is {name!r}, which needs {', '.join(sorted(missing))} in each prediction; {task.name} adds {has}"
            )
            yield Fault(key=f"score.metrics.{number}", problem=problem, hint=f"such as {task.metrics[0]}")
