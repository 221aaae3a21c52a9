"""What planning knows of each task: one record per task, which says what sets the task apart.

A task is two halves with one name. The pure half is a record here; its runtime half is the module that the record
names, which only the jobs import. Nothing else compares the names of tasks. A third-party task is an entry point of
the group `sousbatch.tasks` that names such a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...errors import Fault, UsageError, nearest

if TYPE_CHECKING:
    from ..data.encode import Encoded
    from ..data.rows import Row
    from ..facts import Inputs
    from ..plan import Stage
    from ..schema import StageSettings
    from ..stage_kinds import RowUse

ENTRY_POINTS = "sousbatch.tasks"


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
    of the other half. *model_class* is a class of transformers, *peft_type* a TaskType of peft, and *head_modules* are
    the linear layers that get no adapter from `all-linear`. *has_new_head* says that pretrained weights lack the head.

    A task that *generates* lets an engine answer with tokens. *decides* lists the settings that decide a prediction
    besides those of the engine; *reads* lists the sections of the settings that *encode* reads.
    """

    name: str
    version: int
    runtime: str
    model_class: str
    peft_type: str
    head_modules: tuple[str, ...] = ()
    has_new_head: bool = False
    generates: bool
    decides: tuple[str, ...]
    reads: tuple[str, ...]
    metrics: tuple[str, ...]  # that make sense for it; those of score.metrics are among them
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


# The modules of the tasks that this package has; each calls its record TASK.
TASKS: dict[str, str] = {"causal_lm": f"{__name__}.causal_lm"}
# These can be written down; planning refuses them.
LATER = ("seq2seq", "question_answering", "classification")


def task_of(name: str) -> TaskSpec:
    """Return the task called *name*.

    Raises:
        UsageError: no version has it, or only a later one.
    """
    if name in TASKS:
        task = import_module(TASKS[name]).TASK
    elif (entry := _third_party().get(name)) is not None:
        task = entry.load()
    else:
        known = ", ".join((*TASKS, *_third_party()))
        what = "can be written down but not run by this version" if name in LATER else "is unknown"
        raise UsageError(f"task {name!r} {what}; known: {known}")
    if not isinstance(task, TaskSpec) or task.name != name:
        raise UsageError(f"the entry point {name!r} of {ENTRY_POINTS} is not a TaskSpec of that name")
    return task


def known_task(name: str) -> TaskSpec | None:
    """Return the task called *name*, None for one that comes later: a recipe for it can be written down."""
    return None if name in LATER and name not in TASKS else task_of(name)


def unknown_task(name: str) -> Fault | None:
    """Return the fault of a task's name that nobody knows; one that comes later is refused when it is planned."""
    known = [*TASKS, *LATER]
    if name in known or name in _third_party():
        return None
    known += _third_party()
    return Fault(key="task", problem=f"is {name!r}; known: {', '.join(known)}", hint=nearest(name, known))


def _third_party() -> dict[str, Any]:
    from importlib.metadata import entry_points  # looks at every installed package, so only when a name needs it

    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
