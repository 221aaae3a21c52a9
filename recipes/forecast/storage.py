"""Forecast what a run holds on disk, and how well its checkpoints fit. Pure.

The sizes of single files are in `checkpoints.sizes`; what is done at each save is decided in
`checkpoints.retention.admission`, by the same sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ...checkpoints.formats.tensors import FloatDtype
from ...checkpoints.retention.save_level import SAVE_LEVELS, SaveLevel, least_held
from ...checkpoints.sizes import Size, checkpoint_size, model_size
from ..decodings import decodings_of
from ..engines import engine_of
from ..facts import Inputs, ModelFacts
from ..model_kinds import overflows_in_float16
from ..optimizers import moment_bytes
from ..plan import Batch, CheckpointForecast, Forecast, ForecastLine, Stage
from ..retention import model_dtype, num_best_kept, weights_dtype
from ..schema import Adapter, Recipe, StageSettings
from ..tasks import task_of
from .parameters import merge_bytes, params_of


class Fit(NamedTuple):
    """A degree of how well checkpoints may fit.

    It says how much a save keeps, and whether all stay that the policies keep.
    """

    level: SaveLevel
    keeps_all: bool = False

    def __str__(self) -> str:
        if self.level == "full":
            return "full" if self.keeps_all else "full, older ones stripped or removed"
        return {"weights": "weights only", "none": "weights at the end only"}[self.level]


FITS = (Fit("full", keeps_all=True), *map(Fit, SAVE_LEVELS))  # the best first
_CHECKPOINTS_OF = "checkpoints of "
_MODEL_OF, _MERGING_OF = "model of ", "merging of "
_LOG_ENTRY_BYTES = 190  # one entry of the log in trainer_state.json
_LOG_BYTES_PER_STEP = 200  # one line of log and one ledger event, seldom more
_FIXED_LOG_BYTES = 2_000_000  # start-up messages of every stage, the tracker's files: measured 1 to 2 MB


def with_slack(num_bytes: int) -> int:
    """Return the bytes to ask for something of a forecast size.

    A forecast is right to 2 %, and files take whole blocks.
    """
    return int(num_bytes * 1.02) + 64 * 1024


def with_dtype(recipe: Recipe, model: ModelFacts) -> Recipe:
    """Return *recipe* with the dtype of the consolidated model.

    The dtype follows *model* where the recipe is silent. A bfloat16 model stays one: float16 has a smaller range, and
    might not hold its weights. Neither can a T5 compute in float16.
    """
    if recipe.consolidate.dtype is not None:
        return recipe
    own = model.config.get("dtype") or model.config.get("torch_dtype") or model.tensors[0].dtype
    if not recipe.train.master_weights:
        own = recipe.train.precision
    dtype: FloatDtype = "bfloat16" if own == "bfloat16" or overflows_in_float16(model.config) else "float16"
    return replace(recipe, consolidate=replace(recipe.consolidate, dtype=dtype))


def checkpoint_of(settings: StageSettings, model: ModelFacts, batch: Batch) -> Size:
    """Return the size of the last full checkpoint of a train stage.

    With the log it is the largest.
    """
    params, train = params_of(settings, model), settings.train
    measured = batch.save_every_steps, train.eval_every_steps or batch.steps
    logs = batch.steps // train.log_every_steps + sum(
        batch.steps // every * (bool(train.eval_split) + bool(every % train.log_every_steps)) for every in measured
    )
    return checkpoint_size(
        states=engine_of(settings).state_bytes(settings, batch.world_size, moment_bytes(settings, model, params)),
        trainable=params.trainable,
        frozen=params.frozen,
        num_tensors=params.num_tensors,
        world_size=batch.world_size,
        adapter=settings.adapter.method != "full",
        beside_bytes=model.beside_bytes + _LOG_ENTRY_BYTES * logs,
    )


def weights_of(settings: StageSettings, model: ModelFacts) -> Size:
    """Return the size of a checkpoint that holds weights only.

    The weights are the model's, or the adapter's.
    """
    if settings.adapter.method == "full":
        return model_of(settings, model)
    params = params_of(settings, model)
    return model_size(
        num_params=params.trainable,
        dtype=weights_dtype(settings),
        num_tensors=params.num_tensors,
        beside_bytes=model.beside_bytes,
    )


def model_of(settings: StageSettings, model: ModelFacts) -> Size:
    """Return the size of the consolidated model.

    An adapter is merged into its base, so its model is as large.
    """
    return model_size(
        num_params=model.num_params,
        dtype=model_dtype(settings),
        num_tensors=len(model.tensors),
        beside_bytes=model.beside_bytes,
    )


def later_bytes(found: Forecast) -> int:
    """Return what a run writes besides its checkpoints."""
    return sum(line.num_bytes for line in found.storage if not line.what.startswith(_CHECKPOINTS_OF))


def lasting_bytes(found: Forecast) -> int:
    """Return what a run holds whose checkpoints and models were removed."""
    gone = (_CHECKPOINTS_OF, _MODEL_OF, _MERGING_OF)
    return sum(line.num_bytes for line in found.storage if not line.what.startswith(gone))


def storage_of(inputs: Inputs, stages: Sequence[Stage]) -> tuple[list[ForecastLine], dict[str, CheckpointForecast]]:
    """Return what the run of *stages* holds, line by line, and how well it fits.

    Each line is as large as the fit allows.
    """
    beside = [line for stage in stages for line in _beside(inputs, stage)]
    steps = sum(stage.batch.steps for stage in stages if stage.batch)
    log_bytes = _FIXED_LOG_BYTES + _LOG_BYTES_PER_STEP * steps
    beside.append(
        ForecastLine(what="logs, ledger, tracking", num_bytes=log_bytes, formula=f"2 MB + 200 B x {steps} steps")
    )
    if cached := inputs.model.cached_bytes:  # jobs work offline and install nothing, so no cache grows after planning
        formula = f"{cached:,} B of the model are there already, and no longer count as free"
        beside.append(ForecastLine(what="cache of models", num_bytes=0, formula=formula))
    free = inputs.disk_space.free_bytes - sum(line.num_bytes for line in beside)
    checkpoints = _forecast_checkpoints(inputs.model, stages, free)
    kept = [
        _line(inputs.model, stage, _fit_of(checkpoints[stage.name])) for stage in stages if stage.name in checkpoints
    ]
    return kept + beside, checkpoints


def needs(settings: StageSettings, model: ModelFacts, stage: Stage) -> dict[Fit, int]:
    """Return what the checkpoints of a train stage hold at their peak, for each fit.

    The newest full state, its successor that is being written, the best one's weights; without
    full states the weights of the last, the best and the one being written; at least those at the end.
    """
    parts = {fit: _parts(settings, model, stage, fit) for fit in FITS}
    return {fit: sum(count * with_slack(size) for count, size, _ in those) for fit, those in parts.items()}


def _parts(settings: StageSettings, model: ModelFacts, stage: Stage, fit: Fit) -> list[tuple[int, int, str]]:
    """Return what a train stage holds at its peak.

    Each part is (how many, bytes of one, formula of one).
    """
    assert stage.batch is not None, "only train stages have checkpoints"
    spec, num_best, batch = settings.checkpoints, num_best_kept(settings), stage.batch
    size, weights = checkpoint_of(settings, model, batch), weights_of(settings, model)
    full, light = (size.num_bytes, size.formula), (weights.num_bytes, f"weights: {weights.formula}")
    extra = sum(step % batch.save_every_steps != 0 and step != batch.steps for step in spec.keep_steps)
    saves = math.ceil(batch.steps / batch.save_every_steps) + extra
    older = num_best + len(spec.keep_steps)
    older += batch.steps // math.lcm(spec.keep_every_steps, batch.save_every_steps) if spec.keep_every_steps else 0
    if fit.keeps_all and spec.thin:
        newest = min(saves, spec.keep_last + 1)
        return [(newest, *full), (min(saves - newest, older), *light)]
    if fit.keeps_all:
        return [(min(saves, spec.keep_last + older + 1), *full)]
    held = least_held(fit.level, min(1, num_best) + len(spec.keep_steps))
    num_full = min(saves, held.num_full)
    return [(num_full, *full), (min(saves - num_full, held.num_weights), *light)]


def _line(model: ModelFacts, stage: Stage, fit: Fit) -> ForecastLine:
    parts = [part for part in _parts(stage.settings, model, stage, fit) if part[0]]
    formula = " + ".join(f"{count} x {size:,} B [{text}]" for count, size, text in parts)
    num_bytes = sum(count * size for count, size, _ in parts)
    return ForecastLine(what=f"{_CHECKPOINTS_OF}{stage.name}", num_bytes=num_bytes, formula=f"{formula}; {fit}")


def _beside(inputs: Inputs, stage: Stage) -> Iterator[ForecastLine]:
    settings, leaves = stage.settings, stage.record.leaves
    if leaves == "model":
        size = model_of(settings, inputs.model)
        yield ForecastLine(what=f"{_MODEL_OF}{stage.name}", num_bytes=size.num_bytes, formula=size.formula)
        if merged := merge_bytes(settings, inputs.model):
            formula = f"4 B x {inputs.model.num_params:,}, for a while"
            yield ForecastLine(what=f"{_MERGING_OF}{stage.name}", num_bytes=merged, formula=formula)
    if leaves == "predictions":
        rows = stage.splits["predict"].num_rows
        sizes = [task_of(one.task).row_bytes(one) for one in decodings_of(settings).values()]
        formula = f"2 (units, merged) x {rows:,} rows x {' + '.join(text for _, text in sizes)}"
        num_bytes = 2 * rows * sum(size for size, _ in sizes)
        yield ForecastLine(what=f"predictions of {stage.name}", num_bytes=num_bytes, formula=formula)


def _forecast_checkpoints(model: ModelFacts, stages: Sequence[Stage], free_bytes: int) -> dict[str, CheckpointForecast]:
    """Return how well each train stage's checkpoints fit.

    They must fit into both its own budget and the free space. The stages' checkpoints stay, so on the disk they count
    together: the stage in question with all of its checkpoints, the others with their final weights only.
    """
    views = {stage.name: (stage.settings, stage) for stage in stages if stage.batch is not None}
    wanted = {name: needs(settings, model, stage) for name, (settings, stage) in views.items()}
    found = {}
    for name, (settings, stage) in views.items():
        room = free_bytes - sum(other[FITS[-1]] for key, other in wanted.items() if key != name)
        if settings.checkpoints.budget_gb is not None:
            room = min(room, int(settings.checkpoints.budget_gb * 1e9))
        fit = _best_fit(wanted[name], room)
        found[name] = CheckpointForecast(
            save_level=fit.level if fit else "none",
            keeps_all=fit is not None and fit.keeps_all,
            free_bytes=room,
            full_bytes=wanted[name][FITS[0]],
            least_bytes=wanted[name][FITS[-1]],
            fits=fit is not None,
            change="" if fit == FITS[0] else _smallest_change(settings, model, stage, room),
        )
    return found


def _best_fit(wanted: Mapping[Fit, int], free_bytes: int) -> Fit | None:
    return next((fit for fit in FITS if wanted[fit] <= free_bytes), None)


def _fit_of(found: CheckpointForecast) -> Fit:
    return Fit(found.save_level, found.keeps_all)


def _smallest_change(settings: StageSettings, model: ModelFacts, stage: Stage, free_bytes: int) -> str:
    """Return the least change that makes all checkpoints fit in full.

    It is to keep fewer, an adapter, or more space. Where not even the weights at the end fit, it is the least change
    that makes these fit.
    """
    wanted = needs(settings, model, stage)
    target = FITS[0] if _best_fit(wanted, free_bytes) else FITS[-1]
    may_adapt = settings.adapter.method == "full" and not stage.model.is_random
    ways = (
        text for text, changed in _changes(settings, may_adapt) if needs(changed, model, stage)[target] <= free_bytes
    )
    more = f"{_up((wanted[target] - free_bytes) / 1e9)} GB more in the runs directory"
    if is_own_limit(settings, free_bytes):
        more = f"checkpoints.budget_gb={_up(wanted[target] / 1e9)}"
    return " or ".join([*itertools.islice(ways, 1), more])


def is_own_limit(settings: StageSettings, free_bytes: int) -> bool:
    """Say whether it is the train stage's own budget that leaves it *free_bytes*."""
    return settings.checkpoints.budget_gb is not None and free_bytes == int(settings.checkpoints.budget_gb * 1e9)


def _changes(settings: StageSettings, may_adapt: bool) -> Iterator[tuple[str, StageSettings]]:
    """Yield ways to need less, the mildest first.

    They are stripping, fewer, both, the fewest, an adapter.
    """
    spec, thin = settings.checkpoints, {"checkpoints.thin": True}
    fewer: list[dict[str, Any]] = [
        {"checkpoints.keep_every_steps": None},
        *({"checkpoints.keep_last": number} for number in range(spec.keep_last - 1, 0, -1)),
        *({"checkpoints.keep_best": number} for number in range(spec.keep_best - 1, 0, -1)),
    ]
    least = {"checkpoints.keep_every_steps": None, "checkpoints.keep_last": 1, "checkpoints.keep_best": 1}
    none = {"checkpoints.keep_best": 0, "consolidate.choose": "last"}
    ways = [thin, *fewer, *({**way, **thin} for way in fewer), {**least, **thin}, none, {**least, **none}]
    for way in ways:
        changed = settings
        for key, value in way.items():
            section, _, name = key.partition(".")
            changed = replace(changed, **{section: replace(getattr(changed, section), **{name: value})})
        if changed != settings:
            changed_keys = {key: value for key, value in way.items() if _value(settings, key) != value}
            yield " ".join(f"{key}={_written(value)}" for key, value in changed_keys.items()), changed
    if may_adapt:
        yield "adapter=lora", replace(settings, adapter=Adapter(method="lora"))


def _value(settings: StageSettings, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(settings, section), name)


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def _up(value_gb: float) -> str:
    """Return gigabytes with three digits, rounded up: the number is enough."""
    digits = 2 - math.floor(math.log10(max(value_gb, 1e-9)))
    return f"{math.ceil(value_gb * 10**digits) / 10**digits:.{max(0, digits)}f}"
