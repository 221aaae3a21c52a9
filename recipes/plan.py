"""The plan: a recipe, a site and the inputs, compiled into stages. Pure data, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .. import __version__, files
from ..cluster.site import Site
from ..errors import NotFoundError, UsageError
from ..run_folder import PLAN_FORMAT, RunPaths
from .schema import Kind, Recipe, Resources, validate


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the model really is. *digest* covers config, tokenizer and weight headers, not every weight.

    *beside_bytes* are those of its config and tokenizer, which lie with every checkpoint; *cached_bytes* lie in the
    hub's cache already, for a model that comes from there.
    """

    folder: str
    tokenizer_folder: str
    digest: str
    has_weights: bool
    num_params: int
    tensors: tuple[TensorFacts, ...]
    config: dict[str, Any]
    beside_bytes: int = 0
    cached_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """What a data file really holds; *digest* is the sha256 of its bytes, *nested* columns have a list or object."""

    path: str
    num_rows: int
    num_bytes: int
    digest: str
    columns: tuple[str, ...]
    nested: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How many rows are of some kind, and the numbers of the first of them, counted from 1."""

    num: int = 0
    first: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What the rows of a stage are in tokens, as its job will see them.

    *longest* is a row's length before any cut, *longest_kept* after it. Rows are *long* above *limit*, have an *empty*
    target, or nothing to *learn* (of prompts: no token). The job uses *num_kept* of the *num_rows* that were looked at.
    """

    stage: str
    use: Literal["train", "eval", "predict"]
    split: str
    limit: int | None
    num_rows: int
    num_kept: int
    longest: int
    longest_kept: int
    long: Rows = Rows()
    empty: Rows = Rows()
    unlearnable: Rows = Rows()


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the store of the run can still take, less what it is promised to *num_runs* other runs.

    *source* is what sets the limit: free space, a quota, or the budget of the store. *free_bytes* is below 0 by
    what the others hold or were promised beyond that limit.
    """

    folder: str
    free_bytes: int
    free_inodes: int
    source: str = "free space"
    promised_bytes: int = 0
    num_runs: int = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a recipe's model, data and store really are, and the *versions* of the packages that jobs will import."""

    model: ModelFacts
    splits: dict[str, SplitFacts]
    room: Room
    code_digest: str
    versions: dict[str, str] = field(default_factory=dict)
    lengths: tuple[Lengths, ...] = ()

    def lengths_of(self, stage: str, use: Literal["train", "eval", "predict"]) -> Lengths | None:
        """Return the lengths of a stage's rows, None where they were not looked at."""
        return next((one for one in self.lengths if (one.stage, one.use) == (stage, use)), None)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How a train stage reaches its global batch. Counts of rows and of optimizer steps."""

    world_size: int
    micro_batch: int
    accumulation: int
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    save_every_steps: int

    @property
    def global_batch(self) -> int:
        """Rows of one step over all ranks."""
        return self.world_size * self.micro_batch * self.accumulation


@dataclass(frozen=True, kw_only=True)
class After:
    """A dependency: the stage named must have ended, well ("ok") or anyhow ("any")."""

    stage: str
    condition: Literal["ok", "any"] = "ok"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the plan. *of* is the stage whose output it works on, if any."""

    name: str
    kind: Kind
    of: str | None
    resources: Resources
    num_tasks: int
    after: tuple[After, ...]
    batch: Batch | None = None

    @property
    def uses_devices(self) -> bool:
        """Whether its ranks compute on devices; the other kinds are one process each."""
        return self.kind in ("train", "predict", "sweep")

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


Rung = Literal["full", "thinned best", "weights only", "none"]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """How a train stage's checkpoints fit: the rung that holds, and the least change for a better one.

    On "none" there is room for the weights at the end alone; *fits* says that at least these, *least_bytes*, have it.
    """

    rung: Rung
    fits: bool
    room_bytes: int
    full_bytes: int
    change: str
    least_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the run will take: storage at its peak; of each train stage memory on one device, and its rung."""

    storage: tuple[ForecastLine, ...]
    storage_peak_bytes: int
    device: dict[str, tuple[ForecastLine, ...]]
    ladders: dict[str, Ladder] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What points of a sweep share: a recipe's plain values, every ${key} still in them, and its inputs."""

    values: dict[str, Any]
    inputs: Inputs


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a sweep: overrides to lay over a variant, given by its position; *label* is what tells it apart."""

    variant: int
    overrides: tuple[str, ...]
    label: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The points of a sweep. Each becomes a run of its own when its task starts."""

    variants: tuple[Variant, ...]
    points: tuple[Point, ...]
    is_smoke: bool = False


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
    def run_id(self) -> str:
        """The digest of what decides the results: recipe less resources and tracking, code and data."""
        recipe = validate.to_plain(self.recipe)
        deciding = {
            name: value for name, value in recipe.items() if name not in ("resources", "tracking", "description")
        }
        data = {name: split.digest for name, split in self.inputs.splits.items()}
        decided = [deciding, self.inputs.model.digest, data, self.inputs.code_digest]
        if self.sweep is not None:
            points = [(point.variant, point.overrides) for point in self.sweep.points]
            decided += [points, [variant.values for variant in self.sweep.variants]]
        return ("sweep-" if self.sweep else "") + files.digest_of(decided)[:12]

    def stage(self, name: str) -> Stage:
        """Return the stage called *name*, or raise a NotFoundError that lists all."""
        return _named(name, self.stages)

    def upstream(self, stage: Stage, kind: Kind) -> Stage | None:
        """Return the nearest stage of *kind* among those that *stage* works on, itself included."""
        current: Stage | None = stage
        while current is not None and current.kind != kind:
            current = self.stage(current.of) if current.of else None
        return current

    def to_json(self) -> str:
        """Return the plan as text: the same bytes for the same plan."""
        return json.dumps(validate.to_plain(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class StageGlance:
    """As much of a stage as telling its state takes."""

    name: str
    kind: Kind
    num_tasks: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Glance:
    """As much of a plan as telling the states of its run takes. *problem* is why no more of it can be told."""

    recipe_name: str
    launcher: str
    stages: tuple[StageGlance, ...]
    problem: str = ""
    is_sweep: bool = False

    def stage(self, name: str) -> StageGlance:
        """Return the stage called *name*, or raise a NotFoundError that lists all."""
        return _named(name, self.stages)


_AnyStage = TypeVar("_AnyStage", Stage, StageGlance)


def _named(name: str, stages: Sequence[_AnyStage]) -> _AnyStage:
    for stage in stages:
        if stage.name == name:
            return stage
    known = ", ".join(stage.name for stage in stages)
    raise NotFoundError(f"stage {name!r} is not in this run; its stages: {known}")


def glance(path: Path) -> Glance:
    """Read the little of a frozen plan that an overview of many runs shows, which takes a tenth of reading it whole.

    A damaged plan, or one of another version, has a *problem*, and as many stages as can be read all the same.
    """
    values: Any = None
    problem = ""
    try:
        values = _json(path)
        _check_format(path, values)
    except UsageError as error:
        problem = str(error)
    try:
        return Glance(
            recipe_name=_typed(values["recipe"]["name"], str),
            launcher=_typed(values["site"]["launcher"], str),
            stages=tuple(map(_stage_glance, values["stages"])),
            problem=problem,
            is_sweep=values.get("sweep") is not None,
        )
    except (TypeError, KeyError, AttributeError) as error:
        found = problem or f"{path} is damaged: {type(error).__name__} {error}"
        return Glance(recipe_name=RunPaths(root=path.parent).recipe_name, launcher="", stages=(), problem=found)


def _stage_glance(stage: dict[str, Any]) -> StageGlance:
    steps = stage["batch"]["steps"] if stage["batch"] else 0
    return StageGlance(
        name=_typed(stage["name"], str),
        kind=_typed(stage["kind"], str),
        num_tasks=_typed(stage["num_tasks"], int),
        steps=_typed(steps, int),
    )


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def read_plan(path: Path) -> Plan:
    """Read a frozen plan.

    Raises:
        UsageError: it was written by a version with another format, or is no plan.
    """
    plan, faults = validate.build(Plan, _values(path))
    if plan is None or not plan.stages:
        raise UsageError(f"{path} is damaged: {'; '.join(map(str, faults[:3])) or 'it has no stages'}")
    return plan


def _values(path: Path) -> dict[str, Any]:
    values = _json(path)
    _check_format(path, values)
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path.parent} is no run folder: it has no plan.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or "format" not in values:
        raise UsageError(f"{path} is damaged: it is no plan")
    return values


def _check_format(path: Path, values: dict[str, Any]) -> None:
    found = values["format"]
    if found != PLAN_FORMAT:
        raise UsageError(
            f"run folder {path.parent} was made by sousbatch {values.get('version', '?')} with plan format {found}; "
            f"this is {__version__}, which reads format {PLAN_FORMAT}: use that version, or submit the recipe again"
        )
