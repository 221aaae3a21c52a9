"""Plan searches: sweeps whose points get their values when they start.

The values follow from what earlier points scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ..cluster.site import Site
from ..errors import Fault, PlanError, RecipeError, UsageError, nearest
from ..predictions.metrics import is_lower_better, metric_of
from . import overrides
from .catalog import find_recipe
from .compose import recipe_of, values_of
from .dashboards import score_names
from .inspect.inputs import inspect
from .inspect.lengths import Progress
from .plan import Axis, Plan, Point, Search, Sweep, Variant
from .publications import shared_places
from .sweep import SHARED, checked, is_early, is_known, joined, laid_over, small

NUM_TRIALS = 20


def plan_search(
    name: str,
    texts: Sequence[str],
    spaces: Sequence[str],
    site: Site,
    store: Path,
    *,
    num_trials: int,
    metric: str | None = None,
    is_smoke: bool = False,
    progress: Progress | None = None,
    dead_runs: Collection[Path] = (),
) -> Plan:
    """Return the plan of *num_trials* trials.

    They are points over the recipe *name* with the overrides *texts*. Their values come from *spaces*, such as
    `train.learning_rate=tag(log, interval(1e-5,1e-3))`; the best one has the best *metric*. The ends of every space,
    and each of its choices, are checked here.

    Raises:
        UsageError: Optuna is not installed.
        RecipeError: a fault of a space, or of values that were checked.
        PlanError: values that were checked cannot run here, or nothing tells which trial is best.
    """
    require_optuna("--search")
    faults: list[Fault] = []
    axes = overrides.spaces(spaces, faults)
    faults += [fault for axis in axes for fault in _faults_of(axis, find_recipe(name).parent)]
    size = math.prod(len(axis.choices) or _num_steps(axis) for axis in axes)
    if not faults and size < num_trials:
        hint = f"take --trials {size:.0f}, or run them all with --sweep"
        problem = f"is more than the {size:.0f} there are"
        faults.append(Fault(key=f"--trials {num_trials}", problem=problem, hint=hint))
    if faults:
        raise RecipeError(name, faults)
    values, wrong = values_of(name, texts)
    recipe = small(recipe_of(values, wrong), is_smoke)
    corners = [Point(variant=0, overrides=texts, label=" ".join(texts)) for texts in _corners(axes)]
    try:
        others = [laid_over(values, corner, is_smoke) for corner in corners]
    except RecipeError as error:
        raise RecipeError(name, [_of_space(fault, axes) for fault in error.faults]) from None
    inputs = inspect(recipe, store, progress, dead_runs, others)
    tried = Sweep(variants=(Variant(values=values, inputs=inputs),), points=tuple(corners), is_smoke=is_smoke)
    plans = [checked(tried, index, site) for index in range(len(corners))]
    if reasons := [*shared_places(plans)]:
        raise PlanError(reasons)
    trials = tuple(Point(variant=0, overrides=(), label=f"trial {number}") for number in range(num_trials))
    search = _search_of(plans[0], tuple(axes), metric)
    return joined(replace(tried, points=trials, search=search), plans, site)


def require_optuna(what: str) -> None:
    """Raise UsageError where *what* cannot run, since Optuna is not installed."""
    if find_spec("optuna") is None:
        raise UsageError(f"{what} needs optuna: pip install 'sousbatch[search]'")


def _faults_of(axis: Axis, folder: Path) -> Iterator[Fault]:
    if axis.key.lstrip("+").split(".")[0] in SHARED:
        yield Fault(key=axis.key, problem="cannot be searched", hint="all trials share one name and one request")
    elif is_known(axis.key, folder) and any(is_early(text, folder) for text in _ends(axis)):
        hint = "search one value after the other, or use --sweep, which reads the inputs of each"
        yield Fault(key=axis.key, problem="cannot be searched: it changes what is read", hint=hint)


def _of_space(fault: Fault, axes: Sequence[Axis]) -> Fault:
    """Return a fault of a drawn value as one of its space."""
    for axis in axes:
        if axis.key == fault.key and axis.step is None and not axis.choices and "whole number" in fault.hint:
            space = f"{axis.key}=int(interval({axis.low:g},{axis.high:g}))"
            return Fault(key=axis.key, problem="is a whole number", hint=f"write {space}")
    return fault


def _ends(axis: Axis) -> list[str]:
    """Return the overrides of an axis to check: every choice, or both ends.

    A value between the ends is checked, too: those of `train.steps=interval(2,4)` are whole numbers, and what a trial
    draws is not.
    """
    if axis.choices:
        return [f"{axis.key}={choice}" for choice in axis.choices]
    between = axis.low + (axis.high - axis.low) * 0.618
    return [override_of(axis, value) for value in (axis.low, between, axis.high)]


def override_of(axis: Axis, value: float | str) -> str:
    """Return a value of an axis as an override.

    Numbers that are not whole have four digits.
    """
    if isinstance(value, str):
        return f"{axis.key}={value}"
    return f"{axis.key}={value:.4g}" if axis.step is None else f"{axis.key}={int(value)}"


def _num_steps(axis: Axis) -> float:
    return math.inf if axis.step is None else (axis.high - axis.low) // axis.step + 1


def _corners(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Return points in which all ends and choices occur.

    All first ones stand together, and all last ones.
    """
    ends = [_ends(axis) for axis in axes]
    num_points = max(map(len, ends))
    rows = (tuple(one[min(number, len(one) - 1)] for one in ends) for number in range(num_points))
    return list(dict.fromkeys(itertools.chain(rows, [tuple(one[-1] for one in ends)])))


def _search_of(plan: Plan, axes: tuple[Axis, ...], metric: str | None) -> Search:
    """Return a search for the best *metric*.

    Without one it is the first score, else what training measures.
    """
    scores = [name for stage in plan.stages if stage.record.leaves == "scores" for name in stage.settings.score.metrics]
    trains = [stage.settings for stage in plan.stages if stage.batch is not None and stage.settings.is_measured]
    measured = {name: one for one in trains for name in (one.checkpoints.metric, one.metric_in_logs)}
    known = [*dict.fromkeys([*score_names(scores), *measured])]
    wanted = metric or next(iter([*score_names(scores), *scores, *measured]), "")
    if not known and (metric or not wanted):
        raise PlanError(["nothing tells which trial is best: add a score stage, or train.eval_split"])
    if wanted in measured and wanted not in score_names(scores):
        return Search(axes=axes, seed=plan.recipe.seed, goal=measured[wanted].goal, metric=wanted, is_measured=True)
    name = metric_of(wanted)
    if name is None or not any(name.startswith(one) for one in scores):  # rouge makes rouge1 and others
        hint = nearest(wanted, known) or f"known: {', '.join(known)}"
        raise RecipeError(plan.recipe.name, [Fault(key=f"--best {wanted}", problem="is no score of it", hint=hint)])
    return Search(
        axes=axes, seed=plan.recipe.seed, goal="lowest" if is_lower_better(wanted) else "highest", metric=wanted
    )


def with_values(plan: Plan, index: int, texts: Sequence[str]) -> Plan:
    """Return the plan of a search in which the trial at *index* has these overrides."""
    assert plan.sweep is not None, "a search is a sweep"
    points = list(plan.sweep.points)
    points[index] = Point(variant=0, overrides=tuple(texts), label=" ".join(texts))
    return replace(plan, sweep=replace(plan.sweep, points=tuple(points)))
