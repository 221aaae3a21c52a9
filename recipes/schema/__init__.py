"""The schema of a recipe.

Every key stands here once, with its default, its range and its help. The dataclasses are the schema, a module for each
group of sections. `--help` texts, error messages and `recipes show` read the metadata beside each default; the check
itself is in `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...checkpoints.retention.policies import Goal
from ...predictions.metrics import METRICS
from ..stage_kinds import RECIPE_KINDS
from .execution import Environment, Publish, Resources, Tracking
from .fields import key
from .inputs import Adapter, Augment, Bm25, Columns, Data, Generator, Model, Select
from .predictions import Output, Predict, QuestionAnswering, Score, Vllm
from .training import Checkpoints, Consolidate, Schedule, Train, Zero

__all__ = [
    "Adapter",
    "Augment",
    "Bm25",
    "Checkpoints",
    "Columns",
    "Consolidate",
    "Data",
    "Environment",
    "Generator",
    "Model",
    "Output",
    "Predict",
    "Publish",
    "QuestionAnswering",
    "Recipe",
    "Resources",
    "Schedule",
    "Score",
    "Select",
    "StageSettings",
    "StageSpec",
    "Tracking",
    "Train",
    "Vllm",
    "Zero",
]


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One step of the run, when the five usual ones are not enough."""

    kind: str | None = key(None, f"what it does: {', '.join(RECIPE_KINDS)}; its own name when that is a kind")
    of: str | None = key(
        None,
        "the stage whose output it takes; the nearest fitting one above when not given, but for train, which starts "
        "from model.path unless this names a consolidate stage",
    )
    set: dict[str, Any] = key(dict, "sections of the recipe as this stage sees them")


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """The sections that a stage can change for itself, by its `set`."""

    task: str = key(
        "causal_lm",
        "what the model learns: causal_lm (a prompt and what follows it), seq2seq (for encoder-decoders), "
        "classification, question_answering, or a task of another package",
    )
    seed: int = key(0, "seed of weights, order of rows and sampling", at_least=0, at_most=2**32 - 1)
    model: Model = key(Model, "the model to start from")
    adapter: Adapter = key(Adapter, "what trains")
    data: Data = key(Data, "the rows")
    train: Train = key(Train, "how it trains", also=("training", "trainer"))
    checkpoints: Checkpoints = key(Checkpoints, "which training states stay")
    consolidate: Consolidate = key(Consolidate, "how a checkpoint becomes a model")
    predict: Predict = key(Predict, "what is predicted", also=("generation", "decode"))
    question_answering: QuestionAnswering = key(QuestionAnswering, "windows and spans, for that task alone")
    score: Score = key(Score, "how it is measured")
    publish: Publish = key(Publish, "where model and predictions go from the run")

    @property
    def measures_answers(self) -> bool:
        """Whether best means a metric of answers, and no loss."""
        return self.checkpoints.metric not in ("loss", "eval_loss")

    @property
    def metric_in_logs(self) -> str:
        """The name of the value of `checkpoints.metric` in logs and trackers."""
        return f"eval_{self.checkpoints.metric}" if self.measures_answers else self.checkpoints.metric

    @property
    def goal(self) -> Goal:
        """Which end of `checkpoints.metric` is best."""
        if self.checkpoints.goal is not None:
            return self.checkpoints.goal
        is_higher = self.measures_answers and METRICS.load(self.checkpoints.metric).better == "higher"
        return "highest" if is_higher else "lowest"

    @property
    def is_measured(self) -> bool:
        """Whether training measures what `checkpoints.metric` names at each save."""
        return self.checkpoints.metric == "loss" or self.train.eval_split is not None


@dataclass(frozen=True, kw_only=True)
class Recipe(StageSettings):
    """A recipe: what to do, from model and data to scores."""

    name: str = key("", "name of the recipe; its file's name when not given")
    description: str = key("", "one line for `recipes list`")
    resources: dict[str, Resources] = key(
        dict, "per stage name, kind, or `default`; a stage's entry is laid over its kind's, that over the default"
    )
    environment: Environment = key(Environment, "what runs the jobs")
    tracking: Tracking = key(Tracking, "where its numbers are shown")
    stages: dict[str, StageSpec] = key(
        dict,
        "the steps in order; train, consolidate, predict, merge, score when not given; {score: false} drops one that "
        "another recipe gives",
    )
