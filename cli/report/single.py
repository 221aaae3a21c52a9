"""Draw all that a page shows of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from ...predictions.scoring import BASELINE, MODEL, headlines, label
from ...recipes.plan import Plan
from ...run_folder import is_point
from ..results import Shown, format_score
from ..tables import format_size, format_value
from .charts import Line, Unit, line_chart
from .curves import EVAL_LOSS, LOSS, PACE, Points, thin_out
from .facts import RunFacts, StageFacts, peak_bytes, stalls_of
from .markup import (
    Cell,
    Html,
    address,
    clean,
    folded,
    format_number,
    format_time,
    is_web,
    link,
    section,
    table,
    with_code,
)
from .samples import draw_rows, draw_samples, draw_scores
from .storage import draw_storage
from .timeline import draw_stages

_TITLES = {
    LOSS: "Training loss",
    EVAL_LOSS: "Validation loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    PACE: "Examples a second",
    "tokens_per_s": "Tokens a second",
    "step_s": "Time of a step (s)",
    "data_wait_s": "Waiting for data (s a step)",
    "device_memory_gb": "Device memory (GB)",
}
_NAMES = {LOSS: "training", EVAL_LOSS: "validation"}


def run_subtitle(run: RunFacts) -> str:
    """Return what a run is, as HTML."""
    parts = [f"run <b>{escape(run.paths.run_id)}</b>"]
    if run.plan is not None:
        parts += [f"on {escape(run.plan.site.name)}"] * bool(run.folder)
        parts.append(f"{run.plan.inputs.model.num_params:,} parameters")
    if run.problem:
        parts.append(escape(run.problem))
    if run.folder:
        parts.append(f"in {escape(run.folder)}")
    return " · ".join([*parts, *web_links(run.places)])


def web_links(places: Sequence[Shown]) -> list[str]:
    """Return links by name to the places that a browser opens."""
    return [address(one.link, one.what).text for one in places if is_web(one.link)]


def draw_banner(run: RunFacts) -> str:
    """Return why a run failed, with the next step, or what it waits for."""
    if run.failure is not None:
        one = run.failure
        return (
            f"<section class='banner failed' role=alert><h2>{escape(run.label)}: {escape(one.stage)} failed</h2>"
            f"<p>{escape(clean(one.reason))}</p><p><b>Next:</b> {with_code(one.advice)}</p>"
            f"{folded('The end of its log', f'<pre>{escape(one.log)}</pre>')}</section>"
        )
    waits = [stage for stage in run.stages if stage.state is not None and stage.state.word == "waiting"]
    if run.state == "waiting" and waits and waits[0].state is not None:
        reason = waits[0].state.reason
        since = f" for {format_time(waits[0].waited_s)}" if waits[0].waited_s >= 1 else ""
        return (
            f"<section class='banner waiting'><h2>{escape(run.label)}: {escape(waits[0].name)} waits in the queue"
            f"{since}</h2>" + (f"<p>{escape(clean(reason))}</p>" if reason else "") + "</section>"
        )
    return ""


def draw_tiles(run: RunFacts) -> str:
    """Return the numbers that say most about a run."""
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in _tiles(run)
    )
    return f"<dl class=tiles>{tiles}</dl>" if tiles else ""


def _tiles(run: RunFacts) -> Iterator[tuple[str, str, str]]:
    for one in run.samples[:1]:
        for name in headlines(one.scores[MODEL])[:3]:
            copied = one.scores.get(BASELINE, {}).get(name)
            note = "" if copied is None else f"{format_score(copied)} copying the input"
            yield label(name).replace(" (lower is better)", " ↓"), format_score(one.scores[MODEL][name]), note
    curves = run.training.curves if run.training else {}
    for name in (LOSS, EVAL_LOSS):
        if name in curves:
            least = min(value for _, value in curves[name])
            note = f"least {format_number(least)}" if name == EVAL_LOSS else f"step {curves[name][-1][0]:,.0f}"
            yield _TITLES[name], format_number(curves[name][-1][1]), note
    if run.end_s:
        yield "Time", format_time(run.end_s), "from the first event to the last"
    row = run.rows[0] if run.rows else None
    if row is not None and row.examples_per_s:
        tokens = f", {format_number(row.tokens_per_s)} tokens/s" if row.tokens_per_s else ""
        yield "Throughput", f"{format_number(row.examples_per_s)}", f"examples/s in training{tokens}"
    if row is not None and row.device_memory_gb:
        yield "Device memory", f"{row.device_memory_gb:.3g} GB", "the most that training took of a device"
    if row is not None and row.device_hours:
        cost = f"cost {row.device_hours * run.price:.2f}" if run.price else ""
        yield "Device hours", f"{row.device_hours:.2f}", cost
    if (peak := peak_bytes(run.stages)) is not None:
        budget = "" if peak[1] == float("inf") else f"of {format_size(peak[1])} allowed"
        yield "Checkpoints held", format_size(peak[0]), budget
        yield "Paused for saves", format_time(stalls_of(run.stages)), ""


def draw_run(run: RunFacts, *, out: Path, num_points: int, num_characters: int, prefix: str = "") -> str:
    """Return the sections of a run."""
    trained = [stage for stage in run.stages if stage.curves]
    rows = "".join(draw_samples(one, most=num_characters) for one in run.samples)
    if not rows and run.bare:
        rows = f"<p class=said>Nothing scored these.</p>{draw_rows(run.bare, most=num_characters)}"
    storage = "".join(
        draw_storage(stage.storage, stage=stage.name, num_points=num_points, end_s=run.end_s)
        for stage in run.stages
        if stage.storage is not None
    )
    return "".join(
        (
            section("Scores", draw_scores(run.samples), prefix=prefix),
            section("Curves", *(draw_curves(one, num_points, len(trained) > 1) for one in trained), prefix=prefix),
            section("Stages", draw_stages(run), prefix=prefix),
            section("Storage", storage, prefix=prefix),
            section("Samples", rows, prefix=prefix),
            section("Recipe", *_recipe(run), prefix=prefix),
            section("Links", _links(run, out), prefix=prefix),
        )
    )


def draw_curves(stage: StageFacts, num_points: int, is_one_of_several: bool) -> str:
    """Return the charts of a training; both losses stand in one."""
    losses = [(name, stage.curves[name]) for name in (EVAL_LOSS, LOSS) if name in stage.curves]
    suffix = f" of {stage.name}" if is_one_of_several else ""
    right = max((points[-1][0] for points in stage.curves.values()), default=None)
    charts = [
        line_chart(
            [_line(points, _NAMES[name], f"{_NAMES[name]}", num_points) for name, points in losses],
            title=f"Loss{suffix}",
            height=260,
            right=right,
        )
    ]
    for name, points in stage.curves.items():
        if name not in (LOSS, EVAL_LOSS):
            line = _line(points, "", "training" if not name.startswith("eval_") else "validation", num_points // 2)
            charts.append(
                line_chart([line], title=f"{title_of(name)}{suffix}", y=unit_of(name), height=150, right=right)
            )
    return f"<div class=charts>{''.join(charts)}</div>"


def _line(points: Points, name: str, key: str, num_points: int) -> Line:
    return Line(points=thin_out(points, num_points // 2), label=name, key=key, has_dots=key == "validation")


def title_of(name: str) -> str:
    """Return what a value that training reports is called over its chart."""
    if name in _TITLES:
        return _TITLES[name]
    if name.startswith("eval_"):
        return f"Validation {name[5:]}"
    return name.replace("_", " ").capitalize()


def unit_of(name: str) -> Unit:
    """Return the unit of a value by its name."""
    return "B" if name.endswith("_bytes") else ""


def _recipe(run: RunFacts) -> list[str]:
    parts = []
    if run.plan is not None:
        parts.append(table(("what ran", ""), _what_ran(run.plan, run)))
    changes: list[tuple[Cell, ...]] = [
        (key, format_value(new), format_value(old)) for key, old, new in run.changes if new is not None
    ]
    if changes:
        head = ("key", "this recipe", "default")
        parts.append(folded(f"Values that are not the default ({len(changes)})", table(head, changes, kind="keys")))
    if run.recipe:
        parts.append(folded("The whole recipe", f"<pre>{escape(run.recipe)}</pre>"))
    return parts


def _what_ran(plan: Plan, run: RunFacts) -> Iterator[tuple[Cell, Cell]]:
    model = plan.inputs.model
    yield "model", f"{plan.recipe.model.path}, {model.num_params:,} parameters, digest {model.digest[:12]}"
    for name, split in plan.inputs.splits.items():
        yield f"data: {name}", f"{split.num_rows:,} rows, digest {split.digest[:12]}"
    for stage in plan.stages:
        if stage.batch is not None:
            one = stage.batch
            yield (
                f"batch of {stage.name}",
                f"{one.global_batch:,} examples: {one.world_size} ranks × {one.micro_batch} × {one.accumulation} steps "
                f"of accumulation; {one.steps:,} steps, {one.steps_per_epoch:,} an epoch",
            )
    for name, lines in plan.forecast.device.items():
        total = sum(line.num_bytes for line in lines)
        yield f"device memory of {name}", f"{format_size(total)} forecast for one device"
    hosts = list(dict.fromkeys(span.host for stage in run.stages for span in stage.attempts if span.host))
    if hosts:
        more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
        yield "hosts", ", ".join(hosts[:8]) + more
    yield (
        "code",
        f"sousbatch {plan.version}"
        + (f", own code {plan.inputs.code_digest[:12]}" if plan.recipe.environment.code else ""),
    )


def _links(run: RunFacts, out: Path) -> str:
    rows = list_places(run.places)
    rows += [(what, link(str(path), path, out)) for what, path in run.files]
    if run.files:
        rows.append(("run folder", link(str(run.paths.root), run.paths.root, out)))
    if any(what.startswith("model") for what, _ in run.files):
        name = escape(str(run.paths.root) if is_point(run.paths) else run.paths.run_id)
        rows.append(("predict with it again", Html(f"<code>model.path=run:{name}</code>")))
    return table(("what", "where"), rows) if rows else ""


def list_places(places: Sequence[Shown]) -> list[tuple[Cell, Cell]]:
    """Return a row for each place that shows a run."""
    rows: list[tuple[Cell, Cell]] = []
    for one in places:
        shown = address(one.link).text if one.link else ""
        rows.append((one.what, Html(" ".join(filter(None, [shown, with_code(one.note)])))))
    return rows
