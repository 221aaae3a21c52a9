"""Plan sweeps: points are overrides in one plan, and share what they read.

A point is composed in full, as if it had been submitted alone, when its task starts. Before
anything is sent a sample of the points is, so that what cannot work is refused at once.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..cluster.site import Site
from ..errors import Fault, PlanError, RecipeError
from . import overrides
from .catalog import find_recipe
from .compile import compile, stage_model
from .compose import recipe_of, values_of
from .decodings import decodings_of_axes
from .forecast.storage import lasting_bytes
from .inspect.inputs import READ_KEYS, inspect
from .inspect.lengths import Progress
from .inspect.run_models import ALL, each_checkpoint
from .plan import Plan, Point, Stage, Sweep, Variant
from .publications import shared_places
from .schema import Recipe, Resources
from .stages import settings_of, smoke

STAGE = "sweep"
# Points that are composed and compiled before sending: all of few, else a sample that shows each value, where it fits.
_NUM_CHECKED, _NUM_SAMPLED = 64, 16
# Sections that all points have in common.
SHARED = ("name", "resources", "environment", "tracking", "description")
# Sections that change neither what is read nor what a job is given: their values are laid over when a point starts.
_LATE = ("train", "checkpoints", "consolidate", "predict", "adapter", "score", "seed")


def plan_sweep(
    name: str,
    texts: Sequence[str],
    sweep: Sequence[str],
    site: Site,
    store: Path,
    *,
    is_smoke: bool = False,
    progress: Progress | None = None,
    dead_runs: Collection[Path] = (),
) -> Plan:
    """Return the plan of all points of *sweep*, such as `seed=1,2`.

    They are points over the recipe *name* with the overrides *texts*.

    Points are the product of the axes in Hydra's order: the last one changes fastest.

    Raises:
        RecipeError: a fault of an axis, or of a point that was checked.
        PlanError: a point that was checked cannot run here.
    """
    faults: list[Fault] = []
    axes = [
        tuple(dict.fromkeys(axis)) for axis in overrides.axes([_with_each_checkpoint(text) for text in sweep], faults)
    ]
    faults += [
        Fault(key=axis[0], problem="cannot be swept", hint="all points share one name and one request")
        for axis in axes
        if axis[0].split("=")[0].split(".")[0] in SHARED
    ]
    if faults:
        raise RecipeError(name, faults)
    look = partial(inspect, store=store, progress=progress, dead_runs=dead_runs)
    if (recipe := _decodings(name, texts, axes, is_smoke)) is not None:
        return compile(recipe, site, look(recipe))
    early = [index for index, axis in enumerate(axes) if is_early(axis[0], find_recipe(name).parent)]
    variants: dict[tuple[str, ...], int] = {}
    points = []
    for chosen in itertools.product(*axes):
        shared = tuple(chosen[index] for index in early)
        number = variants.setdefault(shared, len(variants))
        rest = tuple(text for index, text in enumerate(chosen) if index not in early)
        points.append(Point(variant=number, overrides=rest, label=" ".join(chosen).replace("\\:", ":")))
    sample = _sample(axes)
    made = []
    for shared, number in variants.items():
        values, wrong = values_of(name, [*texts, *shared])
        recipe = small(recipe_of(values, wrong), is_smoke)
        others = [laid_over(values, points[index], is_smoke) for index in sample if points[index].variant == number]
        made.append(Variant(values=values, inputs=look(recipe, variants=others)))
    whole = Sweep(variants=tuple(made), points=tuple(points), is_smoke=is_smoke)
    plans = {index: checked(whole, index, site) for index in sample}
    if reasons := [*shared_places(list(plans.values()))]:
        raise PlanError(reasons)
    return joined(whole, list(plans.values()), site)


def _decodings(name: str, texts: Sequence[str], axes: Sequence[Sequence[str]], is_smoke: bool) -> Recipe | None:
    """Return the one recipe that a sweep over decoding alone is.

    Its model is trained once and loaded once.
    """
    values, faults = values_of(name, texts)
    recipe = recipe_of(copy.deepcopy(values), list(faults))
    found = decodings_of_axes([overrides.parse(axis, faults) for axis in axes], recipe)
    if not found:
        return None
    section = values.setdefault("predict", {})
    longest = [one["max_new_tokens"] for one in found.values() if isinstance(one.get("max_new_tokens"), int)]
    section.update({"decodings": found} | ({"max_new_tokens": max(longest)} if longest else {}))
    return small(recipe_of(values, faults), is_smoke)


def _with_each_checkpoint(text: str) -> str:
    """Return an axis in which `run:ID@all` has become each checkpoint of that run."""
    key, _, values = text.partition("=")
    if ALL not in values:
        return text
    shown = (each_checkpoint(key, one) if one.endswith(ALL) else [one] for one in values.split(","))
    return f"{key}={','.join(itertools.chain.from_iterable(shown))}"


def is_early(text: str, folder: Path) -> bool:
    """Say whether an override chooses a file, or changes what the run reads."""
    key, _, value = text.partition("=")
    if key.split(".")[0] not in _LATE or any(f"{key}.".startswith(f"{one}.") for one in READ_KEYS):
        return True
    groups, _ = overrides.split_groups(overrides.parse([text], []), folder, [])
    return bool(groups)


def is_known(key: str, folder: Path) -> bool:
    """Say whether a key lies in a section of recipes, or is a group of files."""
    section = key.lstrip("+").split(".")[0]
    return section in {field.name for field in fields(Recipe)} or bool(overrides.files_of_group(key, folder))


def _sample(axes: Sequence[Sequence[str]]) -> list[int]:
    """Return the positions of the points to check: of many, each value once."""
    sizes = [len(axis) for axis in axes]
    total = 1
    for size in sizes:
        total *= size
    if total <= _NUM_CHECKED:
        return list(range(total))
    found = dict[int, None]()
    for step in range(max(sizes)):
        index = 0
        for size in sizes:
            index = index * size + step % size
        found[index] = None
    chosen = list(found)
    pace = max(1, len(chosen) // _NUM_SAMPLED)
    return sorted({*chosen[::pace], 0, total - 1})


def checked(sweep: Sweep, index: int, site: Site) -> Plan:
    try:
        return _plan(sweep, index, site)
    except PlanError as error:
        raise PlanError([f"point {sweep.points[index].label}: {reason}" for reason in error.reasons]) from error


def point_recipe(sweep: Sweep, index: int) -> Recipe:
    """Return the recipe of a point, as composing its overrides alone would give it."""
    point = sweep.points[index]
    return laid_over(sweep.variants[point.variant].values, point, sweep.is_smoke)


def laid_over(variant: dict[str, Any], point: Point, is_smoke: bool) -> Recipe:
    values, faults = copy.deepcopy(variant), list[Fault]()
    items = overrides.parse(point.overrides, faults)
    for item in items:
        overrides.lay_over(values, item, faults)
    faults += overrides.without_effect(values, items)
    return small(recipe_of(values, faults), is_smoke)


def small(recipe: Recipe, is_smoke: bool) -> Recipe:
    return smoke(recipe) if is_smoke else recipe


def _plan(sweep: Sweep, index: int, site: Site) -> Plan:
    return compile(point_recipe(sweep, index), site, sweep.variants[sweep.points[index].variant].inputs)


def point_plan(plan: Plan, index: int) -> Plan:
    """Return the plan of one point of a sweep, for the site of the sweep."""
    assert plan.sweep is not None, "only the plan of a sweep has points"
    return _plan(plan.sweep, index, plan.site)


def joined(sweep: Sweep, plans: Sequence[Plan], site: Site) -> Plan:
    """Return the plan whose one stage runs all stages of a point in each task."""
    first, num_points = plans[0], len(sweep.points)
    resources = _largest(first)
    if sweep.search is not None:  # a trial is chosen the better, the more have ended
        resources = replace(resources, tasks_at_once=resources.tasks_at_once or math.ceil(num_points / 10))
    stage = Stage(
        name=STAGE,
        kind="sweep",
        of=None,
        resources=resources,
        settings=settings_of(first.recipe),
        model=stage_model(first.inputs.model, None),
        num_tasks=num_points,
        after=(),
    )
    peak = max(plan.forecast.storage_peak_bytes for plan in plans)
    num_whole, rest = num_points, 0
    if sweep.search is not None:  # those that run, and the best, hold more than what lasts
        num_whole = min(num_points, (resources.tasks_at_once or num_points) + 1)
        rest = max(lasting_bytes(plan.forecast) for plan in plans)
    less = f" + {num_points - num_whole} x {rest:,} B, what stays of a trial that is not the best"
    line = replace(
        first.forecast.storage[0],
        what=f"{num_points} points",
        num_bytes=num_whole * peak + (num_points - num_whole) * rest,
        formula=f"{num_whole} x {peak:,} B, the peak of the largest that was looked at" + less * (rest > 0),
    )
    space = first.inputs.disk_space
    if line.num_bytes > space.free_bytes:
        raise PlanError(
            [
                f"not enough space: {num_points} points will hold {line.num_bytes / 1e9:.3g} GB and {space.folder} "
                f"can take {max(0, space.free_bytes) / 1e9:.3g} GB; keep fewer checkpoints "
                "or sweep fewer points"
            ]
        )
    return Plan(
        recipe=first.recipe,
        site=site,
        inputs=first.inputs,
        stages=(stage,),
        forecast=replace(first.forecast, storage=(line,), storage_peak_bytes=line.num_bytes),
        warnings=first.warnings,
        sweep=sweep,
    )


def _largest(plan: Plan) -> Resources:
    """Return resources that every stage of a point can run in.

    Each is the most that a stage asks for; times add up, since stages follow each other.
    """
    wanted = [stage.resources for stage in plan.stages]
    devices = [stage.resources for stage in plan.stages if stage.uses_devices]
    lead = devices[0] if devices else wanted[0]
    times = [one.time_min for one in wanted]
    return replace(
        lead,
        nodes=max(one.nodes for one in devices or wanted),
        devices_per_node=max(one.devices_per_node for one in devices or wanted),
        device="gpu" if any(one.device == "gpu" for one in devices) else "cpu",
        cpus_per_device=max(one.cpus_per_device for one in wanted),
        memory_gb=max((one.memory_gb for one in wanted if one.memory_gb), default=None),
        time_min=sum(time for time in times if time) if all(times) else None,
        tasks=1,
    )
