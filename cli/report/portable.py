"""Leave out of a page what is of this machine, for others to read. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from ...launchers.states import word_of
from ...recipes.plan import Plan
from ...recipes.schema import validate
from ...recipes.yaml_files import dump
from ...redaction import without_folders, without_places
from ..results import is_tracker
from .facts import RunFacts, StageFacts
from .markup import is_web

# Sections of a recipe that say where a run was, and nothing of what it made.
_OF_MACHINE = ("resources", "environment", "tracking", "publish")
_Any = TypeVar("_Any")


def portable(run: RunFacts) -> RunFacts:
    """Return what others may see of a run: no folder, host or price.

    Publishing leaves no trace in it, so that a page is the same before and after.
    """

    def clean(text: str) -> str:
        return without_folders(text.replace(str(run.paths.root), run.paths.run_id))

    senders = [stage.name for stage in run.plan.stages if stage.record.leaves == "publication"] if run.plan else []
    stages = tuple(_stage(stage, clean) for stage in run.stages if stage.name not in senders)
    return replace(
        run,
        state=word_of(stage.state.word for stage in stages if stage.state),
        stages=stages,
        end_s=max((span.end_s for stage in stages for span in stage.spans), default=0.0),
        plan=run.plan and _plan(run.plan),
        problem=clean(run.problem),
        failure=None,
        files=(),
        places=[replace(one, note="") for one in run.places if is_tracker(one) and is_web(one.link)],
        recipe=dump(_values(run.plan)) if run.plan else "",
        changes=[
            (key, without_places(old, key), without_places(new, key))
            for key, old, new in run.changes
            if key.split(".")[0] not in _OF_MACHINE
        ],
        folder="",
        price=None,
    )


def _plan(plan: Plan) -> Plan:
    model = replace(plan.recipe.model, path=without_places(plan.recipe.model.path))
    return replace(plan, recipe=replace(plan.recipe, model=model))


def _values(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = without_places(validate.to_plain(plan.recipe))
    return {name: value for name, value in found.items() if name not in _OF_MACHINE}


def _stage(stage: StageFacts, clean: Callable[[str], str]) -> StageFacts:
    storage = stage.storage and replace(
        stage.storage,
        lifetimes=tuple(_cleaned(life, clean) for life in stage.storage.lifetimes),
        events=[(time, _cleaned(event, clean)) for time, event in stage.storage.events],
    )
    return replace(
        stage,
        state=stage.state and _cleaned(stage.state, clean),
        spans=tuple(replace(span, host="") for span in stage.spans),
        storage=storage,
    )


def _cleaned(value: _Any, clean: Callable[[str], str]) -> _Any:
    """Return a record whose sentences name no folder."""
    texts = {name: getattr(value, name, None) for name in ("reason", "message", "why", "advice")}
    return replace(value, **{name: clean(text) for name, text in texts.items() if text})  # type: ignore[type-var]
