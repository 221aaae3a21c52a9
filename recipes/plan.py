"""Define the plan: a recipe, a site and the inputs, compiled into stages.

Pure data, written as JSON. `compile` makes it, and jobs and launchers read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from .. import __version__, files
from ..checkpoints.retention.policies import Goal
from ..checkpoints.retention.save_level import SaveLevel
from ..cluster.site import Site
from ..errors import NotFoundError, UsageError
from ..run_folder import PLAN_FORMAT, SWEEP_PREFIX, RunPaths
from .facts import Inputs
from .schema import Recipe, Resources, StageSettings, validate
from .stage_kinds import STAGE_KINDS, RowUse, StageKind


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The batch of a train stage, in examples and optimizer steps.

    *fallbacks* are what an attempt has given up for device memory, beside its micro batch.
    """

    world_size: int
    micro_batch: int
    accumulation: int
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    save_every_steps: int
    fallbacks: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Examples of one step over all ranks."""
        return self.world_size * self.micro_batch * self.accumulation


@dataclass(frozen=True, kw_only=True)
class After:
    """A dependency: the named *stage* must have ended, well ("ok") or anyhow ("any")."""

    stage: str
    condition: Literal["ok", "any"] = "ok"


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """The model that a stage starts from: an earlier stage's, or the recipe's.

    *made_by* is the earlier stage. The other fields describe the recipe's model, whose weights are drawn at random
    unless it *has_weights*.
    """

    made_by: str | None = None
    folder: str = ""
    tokenizer_folder: str = ""
    digest: str = ""
    has_weights: bool = True

    @property
    def is_random(self) -> bool:
        """Whether there are no weights to start from."""
        return self.made_by is None and not self.has_weights

    def dir_in(self, paths: RunPaths) -> Path:
        """Return its folder, for the run of *paths*."""
        return paths.model(self.made_by) if self.made_by else Path(self.folder)

    def tokenizer_dir_in(self, paths: RunPaths) -> Path:
        """Return the folder of its tokenizer, for the run of *paths*."""
        return paths.model(self.made_by) if self.made_by else Path(self.tokenizer_folder)


@dataclass(frozen=True, kw_only=True)
class StageSplit:
    """A data file as a stage uses it.

    The stage reads the first *num_rows* rows, which become *num_examples* examples for the model.
    """

    name: str
    path: str
    digest: str
    num_rows: int
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the plan, with all that its jobs need.

    *of* is the stage whose output it works on, if any. It writes or reads the checkpoints of *train_stage* and the
    predictions of *predict_stage*. *splits* are the data files that it uses, by their use.
    """

    name: str
    kind: str
    of: str | None
    resources: Resources
    num_tasks: int
    after: tuple[After, ...]
    settings: StageSettings = field(default_factory=StageSettings)
    model: StageModel = field(default_factory=StageModel)
    train_stage: str | None = None
    predict_stage: str | None = None
    splits: dict[RowUse, StageSplit] = field(default_factory=dict)
    batch: Batch | None = None

    @property
    def record(self) -> StageKind:
        """The record of its kind."""
        return STAGE_KINDS[self.kind]

    @property
    def uses_devices(self) -> bool:
        """Whether its ranks compute on devices; the other kinds are one process each."""
        return self.record.uses_devices

    @property
    def ranks_per_node(self) -> int:
        """The processes that the launcher starts on a node.

        There is one for each device where ranks work together. Another process has all devices of its task.
        """
        is_rank_each = self.record.is_distributed or self.record.looks_after_itself
        return self.resources.devices_per_node if self.uses_devices and is_rank_each else 1

    @property
    def cpus_per_rank(self) -> int:
        """The cores of such a process."""
        devices = self.resources.devices_per_node if self.uses_devices else 1
        return self.resources.cpus_per_device * devices // self.ranks_per_node

    @property
    def steps(self) -> int:
        """Optimizer steps of a train stage; 0 for the others."""
        return self.batch.steps if self.batch else 0


@dataclass(frozen=True, kw_only=True)
class ForecastLine:
    """Bytes that something will take, and the formula used."""

    what: str
    num_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True)
class CheckpointForecast:
    """The forecast of how a train stage's checkpoints fit.

    It says how much its saves keep, and the least change for a better forecast. *keeps_all* says that all fits that the
    retention policies keep; else older ones are stripped or go. At the save level "none" there is space for the weights
    at the end alone; *fits* says that at least these, *least_bytes*, do.
    """

    save_level: SaveLevel
    keeps_all: bool
    fits: bool
    free_bytes: int
    full_bytes: int
    change: str
    least_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast of a run: storage at its peak, and memory of one device."""

    storage: tuple[ForecastLine, ...]
    storage_peak_bytes: int
    device: dict[str, tuple[ForecastLine, ...]]
    checkpoints: dict[str, CheckpointForecast] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The base of a sweep's points: their inputs, and plain values with every ${key}."""

    values: dict[str, Any]
    inputs: Inputs


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a sweep: overrides to lay over the variant at that position.

    *label* names the point in messages.
    """

    variant: int
    overrides: tuple[str, ...]
    label: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a search may give one key.

    It is one of *choices*, each as an override's value; without them a number from *low* to *high*, both included: any,
    or with *step* a whole one. With *is_log* numbers are drawn evenly by their logarithm.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: int | None = None
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the points of a sweep get their values when their tasks start.

    The best trial has by *goal* the lowest or highest value of *metric*: a score, or with *is_measured* the best
    that training measured. The same *seed* draws the same values for trials that follow each other.
    """

    axes: tuple[Axis, ...]
    seed: int
    goal: Goal
    metric: str
    is_measured: bool = False


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The points of a sweep. Each becomes a run of its own when its task starts.

    With a *search* they have no overrides yet: each is given some by then.
    """

    variants: tuple[Variant, ...]
    points: tuple[Point, ...]
    is_smoke: bool = False
    search: Search | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled run. That of a sweep has one stage, whose tasks are the points."""

    format: int = PLAN_FORMAT
    version: str = __version__
    recipe: Recipe
    site: Site
    inputs: Inputs
    stages: tuple[Stage, ...]
    forecast: Forecast
    warnings: tuple[str, ...] = ()
    sweep: Sweep | None = None

    @property
    def data_digests(self) -> dict[str, str]:
        """The sha256 of the rows of each split."""
        return {name: split.digest for name, split in self.inputs.splits.items()}

    @property
    def run_id(self) -> str:
        """The digest of what decides the results: recipe, code and data.

        Resources, tracking, publishing and description decide nothing.
        """
        recipe = validate.to_plain(self.recipe)
        untold = ("resources", "tracking", "publish", "description")
        deciding = {name: value for name, value in recipe.items() if name not in untold}
        decided = [deciding, self.inputs.model.digest, self.data_digests, self.inputs.code_digest]
        decided += [[one.stage, one.use, one.rows.digest, sorted(one.sources.values())] for one in self.inputs.prepared]
        decided += [[name, one.digest] for name, one in sorted(self.inputs.used_files.items())]
        if self.sweep is not None:
            points = [(point.variant, point.overrides) for point in self.sweep.points]
            decided += [points, [variant.values for variant in self.sweep.variants]]
            decided += [validate.to_plain(self.sweep.search)] if self.sweep.search is not None else []
        return (SWEEP_PREFIX if self.sweep else "") + files.digest_of(decided)[:12]

    def stage(self, name: str) -> Stage:
        """Return the stage called *name*, or raise a NotFoundError that lists all."""
        return stage_named(name, self.stages)

    def to_json(self) -> str:
        """Return the plan as text: the same bytes for the same plan."""
        return json.dumps(validate.to_plain(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_AnyStage = TypeVar("_AnyStage", bound=_Named)


def stage_named(name: str, stages: Sequence[_AnyStage]) -> _AnyStage:
    """Return the stage called *name*, or raise a NotFoundError that lists all."""
    for stage in stages:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in stages)
    raise NotFoundError(f"stage {name!r} is not in this run; its stages: {known}")


def read_plan(path: Path) -> Plan:
    """Read a frozen plan.

    Raises:
        UsageError: it was written by a version with another format, or is no plan.
    """
    values = plan_values(path)
    check_format(path, values)
    plan, faults = validate.build(Plan, values)
    if plan is None or not plan.stages:
        raise UsageError(f"{path} is damaged: {'; '.join(map(str, faults[:3])) or 'it has no stages'}")
    if unknown := {stage.kind for stage in plan.stages} - set(STAGE_KINDS):
        raise UsageError(f"{path} is damaged: no kind of stage is called {', '.join(sorted(unknown))}")
    return plan


def plan_values(path: Path) -> dict[str, Any]:
    """Return the plain values of a frozen plan of any format."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path.parent} is no run folder: it has no plan.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or "format" not in values:
        raise UsageError(f"{path} is damaged: it is no plan")
    return values


def check_format(path: Path, values: dict[str, Any]) -> None:
    """Raise a UsageError when the plan at *path* has another format than ours."""
    found = values["format"]
    if found != PLAN_FORMAT:
        raise UsageError(
            f"run folder {path.parent} was made by sousbatch {values.get('version', '?')} with plan format {found}; "
            f"this is {__version__}, which reads format {PLAN_FORMAT}: use that version, or submit the recipe again"
        )
