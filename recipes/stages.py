"""The stages of a recipe: kinds, what each works on, what each gets, and the recipe as it sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ..errors import RecipeError
from .schema import KINDS, Kind, Recipe, Resources, StageSpec, validate

# What each kind can work on; the nearest stage above of such a kind is taken. A train stage
# starts from the recipe's model unless it says otherwise, and predict may: None of both needs one.
SOURCES: dict[Kind, Kind] = {
    "train": "consolidate",
    "consolidate": "train",
    "predict": "consolidate",
    "merge": "predict",
    "score": "merge",
    "sweep": "sweep",
}
NEEDS_SOURCE: tuple[Kind, ...] = ("consolidate", "merge", "score")

_SMOKE: dict[str, dict[str, Any]] = {
    "train": {"steps": 2, "eval_rows": 8},
    "checkpoints": {"every_steps": 1},
    "predict": {"rows": 8, "max_new_tokens": 8, "min_new_tokens": 0},
}


def stages_of(recipe: Recipe) -> dict[str, StageSpec]:
    """Return the recipe's stages: its own, or the five usual ones."""
    return recipe.stages or {kind: StageSpec() for kind in KINDS}


def kind_of(recipe: Recipe, stage: str) -> Kind:
    """Return the kind of a stage: what it says, else its name."""
    return cast("Kind", stages_of(recipe)[stage].kind or stage)


def fitting_sources(recipe: Recipe, stage: str) -> list[str]:
    """Return the stages above *stage* that it can work on, in order."""
    names = list(stages_of(recipe))
    wanted = SOURCES[kind_of(recipe, stage)]
    return [name for name in names[: names.index(stage)] if kind_of(recipe, name) == wanted]


def source_of(recipe: Recipe, stage: str) -> str | None:
    """Return the stage whose output *stage* takes; None means the recipe's own model."""
    named = stages_of(recipe)[stage].of
    if named is not None or kind_of(recipe, stage) == "train":
        return named
    fitting = fitting_sources(recipe, stage)
    return fitting[-1] if fitting else None


def resources_of(recipe: Recipe, stage: str) -> Resources:
    """Return the resources of a stage: by its name, else its kind, else `default`, else one device."""
    for key in (stage, kind_of(recipe, stage), "default"):
        if key in recipe.resources:
            return recipe.resources[key]
    return Resources()


def layered_resources(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Resources]:
    """Return the entries that were *given*, each laid over that of its kind, and that over `default`.

    The plain values are needed, since a made `Resources` no longer knows what was given.
    """

    def layered(name: str) -> Resources:
        kind = kind_of(recipe, name) if name in stages_of(recipe) else name
        values: dict[str, Any] = {}
        for layer in ("default", kind, name):
            values |= given.get(layer) or {}
        made, faults = validate.build(Resources, values)
        assert made is not None, f"layers were checked one by one: {faults}"
        return made

    return {str(name): layered(name) for name in given}


def is_measured(view: Recipe) -> bool:
    """Say whether a train stage measures what `checkpoints.metric` names at each save."""
    return view.checkpoints.metric == "loss" or view.train.eval_split is not None


def stage_view(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe as *stage* sees it: its `set` laid over the sections."""
    changes = stages_of(recipe)[stage].set
    return _changed(recipe, changes) if changes else recipe


def smoke(recipe: Recipe) -> Recipe:
    """Return the recipe cut down to try the whole chain: 2 steps, 8 rows, in every stage."""
    stages = {name: {"set": _SMOKE} for name, spec in recipe.stages.items() if spec.set}
    return _changed(recipe, {**_SMOKE, "stages": stages})


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    values = validate.to_plain(recipe)
    _merge(values, changes)
    changed, faults = validate.build(Recipe, values)
    if changed is None:
        raise RecipeError(recipe.name, faults)
    return changed


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], change)
        else:
            values[key] = change
