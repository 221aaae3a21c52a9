"""Resolve the stages of a recipe: what each works on, gets and sees of it.

Pure, and before anything is inspected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..checkpoints.choice import step_named
from ..errors import RecipeError
from .facts import TokenFacts
from .schema import Recipe, Resources, StageSettings, StageSpec, validate
from .stage_kinds import STAGE_KINDS, USUAL_KINDS, RowUse, StageKind

_SMOKE: dict[str, dict[str, Any]] = {
    "train": {"steps": 2, "eval_rows": 8, "metric_rows": 8},
    "checkpoints": {"every_steps": 1, "keep_steps": []},
    "predict": {"rows": 8, "max_new_tokens": 8, "min_new_tokens": 0},
}


@dataclass(frozen=True, kw_only=True)
class RowsWanted:
    """A split that a stage uses, at *most* so many rows, and the key that names it."""

    use: RowUse
    split: str
    most: int | None
    key: str

    def num_rows(self, there: int) -> int:
        """Return how many rows it takes of *there*."""
        return min(self.most or there, there)


@dataclass(frozen=True, kw_only=True)
class ResolvedStage:
    """A stage as the recipe alone says it.

    *of* is the stage whose output it takes. It starts from the model of *model_stage*, or from the recipe's without
    one. It writes or reads the checkpoints of *train_stage* and the predictions of *predict_stage*.
    """

    name: str
    kind: StageKind
    of: str | None
    model_stage: str | None
    train_stage: str | None
    predict_stage: str | None
    resources: Resources
    settings: StageSettings
    rows: tuple[RowsWanted, ...]


def resolve_stages(recipe: Recipe) -> dict[str, ResolvedStage]:
    """Return the stages of *recipe* by name, in order, each with its own settings.

    Raises:
        RecipeError: a stage's `set` does not fit the schema.
    """
    common = settings_of(recipe)
    found: dict[str, ResolvedStage] = {}
    for name, spec in stages_of(recipe).items():
        kind, of = STAGE_KINDS[kind_name(recipe, name)], _source(recipe, name)
        source = found.get(of or "")
        settings = _settings(common, spec, kind, source, recipe.name)
        found[name] = ResolvedStage(
            name=name,
            kind=kind,
            of=of,
            model_stage=of if kind.starts_from_model else source.model_stage if source else None,
            train_stage=name if kind.leaves == "checkpoints" else source.train_stage if source else None,
            predict_stage=name if kind.leaves == "predictions" else source.predict_stage if source else None,
            resources=_resources(recipe, name, kind),
            settings=settings,
            rows=tuple(_rows(settings, kind)),
        )
    seen = {name: _foreseeing(stage, recipe, found.values()) for name, stage in found.items()}
    return {name: _keeping(stage, seen.values()) for name, stage in seen.items()}


def _keeping(stage: ResolvedStage, stages: Iterable[ResolvedStage]) -> ResolvedStage:
    """Return *stage*, which keeps the checkpoints that others choose by their step."""
    chosen = [step_named(one.settings.consolidate.choose) for one in stages if one.of == stage.name]
    if stage.kind.leaves != "checkpoints" or not any(chosen):
        return stage
    spec = stage.settings.checkpoints
    steps = tuple(sorted({*spec.keep_steps, *filter(None, chosen)}))
    return replace(stage, settings=replace(stage.settings, checkpoints=replace(spec, keep_steps=steps)))


def _foreseeing(stage: ResolvedStage, recipe: Recipe, stages: Iterable[ResolvedStage]) -> ResolvedStage:
    """Return *stage* with what it sees as the first stage that works on it does.

    A section that its own `set` changes stays as it is.
    """
    sections = [section for section in stage.kind.foresees if section not in stages_of(recipe)[stage.name].set]
    follower = next((one for one in stages if one.of == stage.name), None)
    if follower is None or not sections:
        return stage
    changes = {section: getattr(follower.settings, section) for section in sections}
    return replace(stage, settings=replace(stage.settings, **changes))


def with_tokens(recipe: Recipe, tokens: TokenFacts | None) -> Recipe:
    """Return *recipe* with the tokens that planning found written out."""
    if tokens is None:
        return recipe
    added = (*recipe.model.add_tokens, *tokens.added)
    return replace(recipe, model=replace(recipe.model, add_tokens=added, add_tokens_from=None))


def settings_of(recipe: Recipe) -> StageSettings:
    """Return what a stage sees that changes nothing."""
    return StageSettings(**{field.name: getattr(recipe, field.name) for field in fields(StageSettings)})


def stages_of(recipe: Recipe) -> dict[str, StageSpec]:
    """Return the recipe's stages: its own, or the usual ones."""
    return recipe.stages or {kind: StageSpec() for kind in USUAL_KINDS}


def kind_name(recipe: Recipe, stage: str) -> str:
    """Return the kind of a stage: what it says, else its name."""
    return stages_of(recipe)[stage].kind or stage


def fitting_sources(recipe: Recipe, stage: str) -> list[str]:
    """Return the stages above *stage* that it can work on, in order."""
    names = list(stages_of(recipe))
    wanted = STAGE_KINDS[kind_name(recipe, stage)].source
    return [name for name in names[: names.index(stage)] if kind_name(recipe, name) == wanted]


def _source(recipe: Recipe, stage: str) -> str | None:
    named = stages_of(recipe)[stage].of
    if named is not None or STAGE_KINDS[kind_name(recipe, stage)].takes_source == "named":
        return named
    fitting = fitting_sources(recipe, stage)
    return fitting[-1] if fitting else None


def _settings(
    common: StageSettings, spec: StageSpec, kind: StageKind, source: ResolvedStage | None, recipe_name: str
) -> StageSettings:
    settings = common
    if source is not None:
        settings = replace(settings, **{section: getattr(source.settings, section) for section in kind.inherits})
    if not spec.set:
        return settings
    values = validate.to_plain(settings)
    _merge(values, spec.set)
    changed, faults = validate.build(StageSettings, values)
    if changed is None:
        raise RecipeError(recipe_name, faults)
    return changed


def _rows(settings: StageSettings, kind: StageKind) -> Iterable[RowsWanted]:
    train, predict = settings.train, settings.predict
    wanted = {
        "train": RowsWanted(use="train", split=train.split, most=None, key="train.split"),
        "eval": RowsWanted(use="eval", split=train.eval_split or "", most=train.eval_rows, key="train.eval_split"),
        "predict": RowsWanted(use="predict", split=predict.split, most=predict.rows, key="predict.split"),
        "score": RowsWanted(use="score", split=predict.split, most=predict.rows, key="score"),
    }
    if "train" in kind.rows and settings.measures_answers:
        most = train.metric_rows or train.eval_rows
        wanted["predict"] = RowsWanted(use="predict", split=train.eval_split or "", most=most, key="train.eval_split")
        return (wanted[use] for use in (*kind.rows, "predict") if wanted[use].split)
    return (wanted[use] for use in kind.rows if wanted[use].split)


def _resources(recipe: Recipe, stage: str, kind: StageKind) -> Resources:
    """Return the resources of a stage, by its name, else its kind, else `default`."""
    for key in (stage, kind.name, "default"):
        if key in recipe.resources:
            return recipe.resources[key]
    return Resources()


def layered_resources(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Resources]:
    """Return the *given* entries, each laid over its kind's, and that over `default`.

    The plain values are needed, since a made `Resources` no longer knows what was given.
    """

    def layered(name: str) -> Resources:
        kind = kind_name(recipe, name) if name in stages_of(recipe) else name
        values: dict[str, Any] = {}
        for layer in ("default", kind, name):
            values |= given.get(layer) or {}
        made, faults = validate.build(Resources, values)
        assert made is not None, f"layers were checked one by one: {faults}"
        return made

    return {str(name): layered(name) for name in given}


def smoke(recipe: Recipe) -> Recipe:
    """Return the recipe cut down to try the whole chain: 2 steps and 8 rows a stage.

    Nothing is published.
    """
    values = validate.to_plain(recipe)
    sent = [name for name in recipe.stages if STAGE_KINDS[kind_name(recipe, name)].leaves == "publication"]
    for name in sent:  # what was trained for 2 steps is for nobody
        del values["stages"][name]
        values["publish"]["url"] = None
    tried = [name for name, spec in recipe.stages.items() if spec.set and name not in sent]
    _merge(values, {**_SMOKE, "stages": {name: {"set": _SMOKE} for name in tried}})
    for section in (values, *(spec["set"] for spec in values["stages"].values())):
        for decoding in section.get("predict", {}).get("decodings", {}).values():
            for name in _SMOKE["predict"].keys() & decoding:
                del decoding[name]
        if step_named(str(section.get("consolidate", {}).get("choose"))):  # there will be no such step
            section["consolidate"]["choose"] = "last"
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
