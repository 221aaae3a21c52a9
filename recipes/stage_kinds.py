"""Define the kinds of stages: one record each says what sets the kind apart.

Nothing else compares the names of kinds. A new kind is a record here and a module jobs/KIND.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowUse = Literal["train", "eval", "predict", "score"]


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """What sets a kind of stage apart.

    *source* is the kind of stage that it works on: one above it is taken when it is `named`, the nearest one `if any`
    is there (else the recipe's own model will do), or it is `required`. *inherits* lists the sections of the recipe
    that it sees as that stage does, before its own `set`; *foresees* lists those that it sees as the first stage does
    that works on it. *rows* says what it uses data files for. *leaves* is what it writes into the run folder.

    Its tasks *share* what is named: a kind that shares nothing has one task. It waits until the stage it works on has
    *ended* well ("ok") or anyhow ("any"). It is *stopped* by a flag that its ranks look at, or by a signal, after
    which it begins again. Its *progress* is counted in the unit named.
    """

    name: str
    does: str
    leaves: Literal["checkpoints", "model", "predictions", "merged predictions", "scores", "runs"]
    source: str | None = None
    takes_source: Literal["named", "if any", "required"] = "required"
    inherits: tuple[str, ...] = ()
    foresees: tuple[str, ...] = ()
    rows: tuple[RowUse, ...] = ()
    starts_from_model: bool = False
    uses_devices: bool = False
    is_distributed: bool = False
    shares: Literal["rows", "weight files", "points"] | None = None
    after: Literal["ok", "any"] = "ok"
    stopped_by: Literal["flag", "signal"] = "signal"
    progress: Literal["steps", "rows", "parts", "points"] | None = None
    is_usual: bool = True
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
            inherits=("data", "predict"),
            after="any",  # however the predictions ended, so that what is missing gets reported
        ),
        StageKind(
            name="score",
            does="measures merged predictions against the targets",
            leaves="scores",
            source="merge",
            inherits=("data", "predict"),
            rows=("score",),
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
