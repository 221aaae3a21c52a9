"""Make the dashboard of a recipe or a sweep: the panels that its stages fill.

Pure. Jobs decide what the values are called; a test holds the names here against those of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..predictions.metrics import METRICS
from ..predictions.scoring import BASELINE, MODEL
from ..tracking.dashboards import CONFIG, RUN, Dashboard, Panel, Section, sweep_name
from ..tracking.identity import group_name
from .decodings import decodings_of
from .plan import Search
from .schema import Recipe, validate
from .stages import ResolvedStage, resolve_stages
from .tasks import with_metrics

# What the scores of a metric are called that has another name or many; those of the rest are called by the metric.
_SCORES: dict[str, tuple[str, ...]] = {
    "rouge": ("rouge1_f1", "rouge2_f1", "rougeL_f1"),
    **{kind: (f"{kind}_f1",) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    "label_f1": (),  # those of the labels, which stand in the data
}
_USUAL_AXES = ("train.learning_rate", "train.global_batch", "train.epochs", "train.steps", "adapter.rank", "seed")
_INSIDE = {"adapter": "adapter.method", "model": "model.path"}  # what a chosen file of a group is known by
_COUNTS = ("missing", "duplicates", "conflicts", "incomplete", "corrupt")
_MOST_DEVICES = 16  # of a node, that have a line each


def recipe_dashboard(recipe: Recipe) -> Dashboard:
    """Return the dashboard of all runs of *recipe*, those of a sweep together."""
    unused = ("adapter.rank",) * (recipe.adapter.method == "full")
    axes = [key for key in _USUAL_AXES if _is_plain(recipe, key) and key not in unused]
    return _dashboard(recipe, axes, name=recipe.name, filter=f"{CONFIG}recipe", wanted=recipe.name, group=f"{RUN}group")


def sweep_dashboard(recipe: Recipe, labels: Sequence[str], run: str, search: Search | None = None) -> Dashboard:
    """Return the dashboard of the points of the sweep *run* over *recipe*.

    *labels* are those of its points, such as "seed=1 train.learning_rate=0.001", or the keys that differ. What a
    *search* makes better tells which point is best.
    """
    keys = dict.fromkeys(word.partition("=")[0].lstrip("+") for label in labels for word in label.split(" "))
    axes = [key for key in (_INSIDE.get(key, key) for key in keys) if _is_plain(recipe, key)]
    group = group_name(recipe.name, run)
    return _dashboard(recipe, axes, search, name=sweep_name(recipe.name, run), filter=f"{RUN}group", wanted=group)


def _dashboard(recipe: Recipe, axes: Sequence[str], search: Search | None = None, **named: str) -> Dashboard:
    recipe = with_metrics(recipe)
    stages = list(resolve_stages(recipe).values())
    is_one = recipe.tracking.per == "run"  # then the names of values begin with the stage
    prefixes = {stage.name: f"{stage.name}/" if is_one else "" for stage in stages}
    trains = [stage for stage in stages if stage.kind.leaves == "checkpoints"]
    merges = [stage for stage in stages if stage.kind.leaves == "merged predictions"]
    scores = [stage for stage in stages if stage.kind.leaves == "scores"]
    target = _target(trains, scores, prefixes, search)
    sections = {
        "Training": _of_each(trains, prefixes, _training),
        "Throughput and system": [*_of_each(trains, prefixes, _throughput), *_system(stages)],
        "Storage": _of_each(trains, prefixes, _storage),
        "Predictions and scores": [*_of_each(scores, prefixes, _scores), *_of_each(merges, prefixes, _merging)],
        "Sweep": list(_sweep(axes, target)),
    }
    return Dashboard(
        project=recipe.tracking.project,
        entity=recipe.tracking.entity,
        sections=tuple(Section(name=name, panels=tuple(panels)) for name, panels in sections.items() if panels),
        **named,
    )


def _of_each(
    stages: Sequence[ResolvedStage],
    prefixes: dict[str, str],
    panels: Callable[[ResolvedStage, str, str], Iterator[Panel]],
) -> list[Panel]:
    """Return the panels of stages; titles name the stage where there are several."""
    found: dict[Panel, None] = {}
    for stage in stages:
        prefix = prefixes[stage.name]
        title = f"{stage.name}: " if prefix and len(stages) > 1 else ""
        for panel in panels(stage, prefix, title):
            found[panel] = None
    return list(found)


def _lines(prefix: str, title: str, *names: str) -> Panel:
    return Panel(kind="lines", title=title, values=tuple(f"{prefix}{name}" for name in names), over=f"{prefix}step")


def _training(stage: ResolvedStage, prefix: str, title: str) -> Iterator[Panel]:
    settings = stage.settings
    measured = settings.train.eval_split is not None
    yield _lines(prefix, f"{title}loss", *("loss", "eval_loss")[: 1 + measured])
    if settings.measures_answers:
        yield _lines(prefix, f"{title}{settings.checkpoints.metric}", settings.metric_in_logs)
    yield _lines(prefix, f"{title}learning rate", "learning_rate")
    yield _lines(prefix, f"{title}norm of the gradient", "grad_norm")


def _throughput(stage: ResolvedStage, prefix: str, title: str) -> Iterator[Panel]:
    throughput = f"{prefix}throughput/"
    shown = {
        "tokens a second": ("tokens_per_s",),
        "examples a second": ("examples_per_s",),
        "seconds of a step, and waiting for its rows": ("step_s", "data_wait_s"),
        "device hours of the attempt": ("device_hours",),
    }
    if stage.resources.device == "gpu":
        shown["most device memory of the first rank, in GB"] = ("device_memory_gb",)
    for what, names in shown.items():
        values = tuple(f"{throughput}{name}" for name in names)
        yield Panel(kind="lines", title=f"{title}{what}", values=values, over=f"{prefix}step")


def _system(stages: Sequence[ResolvedStage]) -> list[Panel]:
    """Return the panels of what a tracker itself measures on a node.

    They are over the seconds since its beginning.
    """
    wanted = [stage.resources for stage in stages if stage.kind.uses_devices and stage.resources.device == "gpu"]
    devices = range(min(_MOST_DEVICES, max((one.devices_per_node for one in wanted), default=0)))
    shown = {
        "CPU of the node, in %": ("system/cpu",),
        "memory of the node, in %": ("system/memory_percent",),
        "utilization of each GPU, in %": tuple(f"system/gpu.{number}.gpu" for number in devices),
        "memory of each GPU, in %": tuple(f"system/gpu.{number}.memoryAllocated" for number in devices),
    }
    return [Panel(kind="lines", title=title, values=names, over="_runtime") for title, names in shown.items() if names]


def _storage(stage: ResolvedStage, prefix: str, title: str) -> Iterator[Panel]:
    yield _lines(prefix, f"{title}bytes held, and the budget, in GB", "storage/held_gb", "storage/budget_gb")
    yield _lines(prefix, f"{title}size of a checkpoint, in GB", "storage/checkpoint_gb")
    yield _lines(prefix, f"{title}seconds that a save stopped training", "storage/stall_s")
    yield _lines(prefix, f"{title}freed by the attempt, in GB", "storage/freed_gb")
    yield _lines(prefix, f"{title}the whole state was saved", "storage/is_full")
    yield Panel(kind="table", values=(f"{prefix}checkpoints",))


def _scores(stage: ResolvedStage, prefix: str, title: str) -> Iterator[Panel]:
    settings = stage.settings
    for decoding in decodings_of(settings):
        place, what = (f"{prefix}{decoding}/", f"{title}{decoding} ") if decoding else (prefix, title)
        for name in score_names(settings.score.metrics):
            yield Panel(kind="bars", title=f"{what}{name}", values=(f"{place}{MODEL}/{name}",))
        copied = [f"{place}{BASELINE}/{name}" for name in score_names(_with_baseline(settings.score.metrics))]
        if copied:
            yield Panel(kind="bars", title=f"{what}scores of copying the input", values=tuple(copied))
        yield Panel(kind="table", values=(f"{place}samples",))


def _merging(stage: ResolvedStage, prefix: str, title: str) -> Iterator[Panel]:
    for decoding in decodings_of(stage.settings):
        place, what = (f"{prefix}{decoding}/", f"{title}{decoding} ") if decoding else (prefix, title)
        yield Panel(kind="bars", title=f"{what}predicted rows", values=(f"{place}num_rows",))
        counts = tuple(f"{place}num_{name}" for name in _COUNTS)
        yield Panel(
            kind="bars", title=f"{what}missing, duplicate, conflicting, incomplete and corrupt rows", values=counts
        )


def _sweep(axes: Sequence[str], target: str) -> Iterator[Panel]:
    keys = tuple(f"{CONFIG}{key}" for key in axes)
    if target and keys:
        yield Panel(kind="parallel", title="what the runs were given, and what came of it", values=(*keys, target))
    if target:
        yield Panel(kind="importance", values=(target,))
        for key in keys:
            yield Panel(kind="scatter", title=key.removeprefix(CONFIG), values=(target,), over=key)
    yield Panel(kind="differences")


def _target(
    trains: Sequence[ResolvedStage],
    scores: Sequence[ResolvedStage],
    prefixes: dict[str, str],
    search: Search | None,
) -> str:
    """Return the value that tells which run is best.

    It is what a *search* makes better, or the first score, else what best means for checkpoints.
    """
    for stage in () if search is not None and search.is_measured else scores:
        for name in [search.metric] if search is not None else score_names(stage.settings.score.metrics):
            decoding = next(iter(decodings_of(stage.settings)))
            return f"{prefixes[stage.name]}{decoding}{'/' * bool(decoding)}{MODEL}/{name}"
    for stage in reversed(trains):
        is_there = stage.settings.is_measured
        return f"{prefixes[stage.name]}{stage.settings.metric_in_logs if is_there else 'loss'}"
    return ""


def score_names(metrics: Sequence[str]) -> list[str]:
    """Return what scores of *metrics* are called, as far as known without rows."""
    return [name for metric in metrics if not METRICS.is_path(metric) for name in _SCORES.get(metric, (metric,))]


def _with_baseline(metrics: Sequence[str]) -> list[str]:
    return [name for name in metrics if not METRICS.is_path(name) and METRICS.load(name).has_baseline]


def _is_plain(recipe: Recipe, key: str) -> bool:
    """Say whether a key of the recipe has a number or a text, in trackers too."""
    value: Any = {name: one for name, one in validate.to_plain(recipe).items() if name not in ("tracking", "stages")}
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return isinstance(value, (str, int, float))
