"""Define the kinds of stages: one record each says what sets the kind apart.

Nothing else compares the names of kinds. A new kind is a record here and a module jobs/KIND.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowUse = Literal["train", "eval", "predict", "score"]


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """The properties of a kind of stage."""

    name: str
    does: str
    # what it writes into the run folder beside its log and its events
    leaves: (
        Literal["checkpoints", "model", "predictions", "merged predictions", "scores", "runs", "publication"] | None
    ) = None
    # the kind of stage that it works on: one above it that `of` names, else the nearest one; it may be required
    source: str | None = None
    takes_source: Literal["named", "if any", "required"] = "required"
    # sections of the recipe that its job reads, and so those that its own `set` can change
    reads: tuple[str, ...] = ()
    # sections that it sees as the stage that it works on does, before its own `set`
    inherits: tuple[str, ...] = ()
    # sections that it sees as the first stage that works on it does, where its own `set` has none
    foresees: tuple[str, ...] = ()
    # what it uses data files for
    rows: tuple[RowUse, ...] = ()
    # it loads a model, that of the stage that it works on or the recipe's own
    starts_from_model: bool = False
    uses_devices: bool = False
    # its ranks work together, started by torchrun; else it is one process
    is_distributed: bool = False
    # what its tasks share; a kind that shares nothing has one task
    shares: Literal["rows", "weight files", "points"] | None = None
    # how the stage that it works on must have ended
    after: Literal["ok", "any"] = "ok"
    # it also starts after all that stages above it leave, not only after the one that it works on
    waits_for_all: bool = False
    # a flag that its ranks look at, or a signal, after which it starts from its beginning
    stopped_by: Literal["flag", "signal"] = "signal"
    # the unit of its progress
    progress: Literal["steps", "rows", "parts", "points"] | None = None
    # a recipe that lists no stages has it
    is_usual: bool = True
    # it starts, resumes and stops its own stages; no recipe can name it
    looks_after_itself: bool = False

    @property
    def module(self) -> str:
        """The module that does its work, found by its name."""
        return "sousbatch.launchers.sweep_point" if self.looks_after_itself else f"sousbatch.jobs.{self.name}"


STAGE_KINDS: dict[str, StageKind] = {
    kind.name: kind
    for kind in (
        StageKind(
            name="train",
            does="trains a model and commits checkpoints",
            leaves="checkpoints",
            source="consolidate",
            takes_source="named",
            reads=(
                *("model", "adapter", "data", "train", "checkpoints", "consolidate", "question_answering"),
                *("predict", "score"),  # where a metric of answers is measured
            ),
            foresees=("consolidate",),  # weights that are kept alone have the dtype that the model will have
            rows=("train", "eval"),
            starts_from_model=True,
            uses_devices=True,
            is_distributed=True,
            stopped_by="flag",
            progress="steps",
        ),
        StageKind(
            name="consolidate",
            does="makes a half-precision model of a checkpoint",
            leaves="model",
            source="train",
            reads=("model", "adapter", "checkpoints", "consolidate"),
            inherits=("model", "adapter", "checkpoints"),
            shares="weight files",
            progress="parts",
        ),
        StageKind(
            name="predict",
            does="answers the rows of a split",
            leaves="predictions",
            source="consolidate",
            takes_source="if any",
            reads=("model", "data", "predict", "question_answering"),
            rows=("predict",),
            starts_from_model=True,
            uses_devices=True,
            shares="rows",
            stopped_by="flag",
            progress="rows",
        ),
        StageKind(
            name="merge",
            does="joins the predictions into one complete file, or names the missing rows",
            leaves="merged predictions",
            source="predict",
            reads=("data", "predict"),  # what is done to texts afterwards, and the file that is to be submitted
            inherits=("data", "predict"),
            after="any",  # however the predictions ended, so that what is missing gets reported
        ),
        StageKind(
            name="score",
            does="measures merged predictions against the targets",
            leaves="scores",
            source="merge",
            reads=("data", "predict", "score"),
            inherits=("data", "predict"),
            rows=("score",),
        ),
        StageKind(
            name="publish",
            does="sends model, predictions and report to a folder, a URL or the hub",
            leaves="publication",
            source="consolidate",
            takes_source="if any",
            reads=("publish",),
            waits_for_all=True,
            is_usual=False,
        ),
        StageKind(
            name="sweep",
            does="runs all stages of one point of a sweep in each task",
            leaves="runs",
            uses_devices=True,
            shares="points",
            progress="points",
            is_usual=False,
            looks_after_itself=True,
        ),
    )
}
# What a recipe can name as a kind, and those that it has when it names none.
RECIPE_KINDS: tuple[str, ...] = tuple(kind.name for kind in STAGE_KINDS.values() if not kind.looks_after_itself)
USUAL_KINDS: tuple[str, ...] = tuple(kind.name for kind in STAGE_KINDS.values() if kind.is_usual)
