"""Decodings: several ways to generate from one model, which a stage loads once.

`predict.decodings` names them; each is the stage with other values of some keys of `predict`. A sweep over such keys
alone becomes decodings of one run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import Fault, nearest
from .generation import ENGINES
from .overrides import Change
from .plan import Stage
from .schema import Predict, StageSettings, validate
from .tasks import task_of
from .tasks.causal_lm import GENERATED

_NAME = re.compile(r"[A-Za-z0-9][\w.=+,-]{0,99}", re.ASCII)
_SECTION = "predict."


def decodings_of(settings: StageSettings) -> dict[str, StageSettings]:
    """Return the settings of each decoding by its name.

    Where the recipe names none there is one, called "".
    """
    if not settings.predict.decodings:
        return {"": settings}
    return {
        name: replace(settings, predict=_changed(settings.predict, changes)[0])
        for name, changes in settings.predict.decodings.items()
    }


def decoded(stage: Stage) -> dict[str, Stage]:
    """Return *stage* as each of its decodings sees it."""
    return {name: replace(stage, settings=settings) for name, settings in decodings_of(stage.settings).items()}


def _changed(predict: Predict, changes: Mapping[str, Any]) -> tuple[Any, list[Fault]]:
    values = {**validate.to_plain(predict), **changes, "decodings": {}}
    return validate.build(Predict, values)


def decoding_faults(view: StageSettings) -> Iterator[Fault]:
    """Yield what is wrong with the decodings of a stage, before they can be made."""
    predict, key = view.predict, "predict.decodings"
    if predict.decodings and not task_of(view.task).generates:
        hint = "leave it out"
        yield Fault(key=key, problem=f"has no meaning for task {view.task}, which generates no text", hint=hint)
    keys = sorted(decoding_keys(view))
    for name, changes in predict.decodings.items():
        own = f"{key}.{name}"
        if not _NAME.fullmatch(name):
            yield Fault(key=own, problem="is no name of a decoding", hint="letters, digits and _ . = + , -")
        if unknown := [one for one in changes if one not in keys]:
            hint = nearest(unknown[0], keys) or f"known: {', '.join(keys)}"
            yield Fault(key=f"{own}.{unknown[0]}", problem="is no key of predict that decides an answer", hint=hint)
            continue
        made, faults = _changed(predict, changes)
        yield from (replace(fault, key=f"{own}.{fault.key}") for fault in faults)
        if made is not None and made.max_new_tokens > predict.max_new_tokens:
            problem = f"is {made.max_new_tokens}, above predict.max_new_tokens {predict.max_new_tokens}"
            hint = f"set predict.max_new_tokens={made.max_new_tokens}: prompts leave space for the longest answer"
            yield Fault(key=f"{own}.max_new_tokens", problem=problem, hint=hint)


def idle_keys(view: StageSettings) -> list[str]:
    """Return the keys of generated text that are set, where the task generates none."""
    if task_of(view.task).generates:
        return []
    names = sorted({key.removeprefix(_SECTION) for key in GENERATED} | decoding_keys(view))
    usual = Predict()
    return [_SECTION + name for name in names if getattr(view.predict, name, None) != getattr(usual, name, None)]


def decoding_keys(view: StageSettings) -> set[str]:
    """Return the keys of `predict` that a decoding may change.

    They are those that decide what the engine generates.
    """
    if ENGINES.problem(view.predict.engine)[0]:
        return set()
    decides = ENGINES.load(view.predict.engine).decides
    return {key.removeprefix(_SECTION) for key in decides if key.startswith(_SECTION)}


def decodings_of_axes(axes: Sequence[Sequence[Change]], view: StageSettings) -> dict[str, dict[str, Any]]:
    """Return the decodings that the points of a sweep are.

    There are none where an axis changes more than decoding.
    """
    keys = {f"{_SECTION}{key}" for key in decoding_keys(view)} if task_of(view.task).generates else set()
    if view.predict.decodings or not all(change.key in keys for axis in axes for change in axis):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for number, point in enumerate(itertools.product(*axes)):
        values = {change.key.removeprefix(_SECTION): change.value for change in point}
        name = ",".join(f"{key}={'null' if value is None else value}" for key, value in values.items())
        found[name if _NAME.fullmatch(name) else f"decoding-{number}"] = values
    return found
