"""`sousbatch report`: one self-contained HTML page about a run.

Everything comes from the run's own folder, as pure functions from its events to text. Events are drawn in the ledger's
order at times that never fall, so that a clock that was set back does not spoil the picture.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from .. import files, ledger
from ..checkpoints.commit import committed
from ..events import CheckpointEvent, Event, Kept, Problem, Saved, Skipped, Step
from ..ledger_queries import CheckpointLifetime, checkpoint_lifetimes, timed
from ..predictions.rows import INDEX, PREDICTION, RAW_PREDICTION
from ..predictions.scoring import MODEL, WHO, headlines, label
from ..predictions.selection import read_examples
from ..recipes.plan import Plan
from ..recipes.plan_summary import PlanSummary
from ..run_folder import RunPaths
from ..run_index import find_run
from .parser import RUN_HELP, Parser, define
from .prediction_view import cut_text
from .results import format_score, read_scores, result_files
from .tables import format_size

_WIDTH, _LEFT, _RIGHT = 960, 80, 20
_OUTCOMES = {
    "kept": "still there",
    "thinned": "stripped to its weights",
    "archived": "moved to the archive",
    "removed": "removed",
    "gone": "no longer there",
}
_MAX_STEPS = 4000  # more points than the picture has pixels
_NOTES = (Skipped, Kept, Problem)
_STYLE = """
:root { --ink: #1d2433; --soft: #667085; --line: #d5dae3; --page: #ffffff; --kept: #1b7f5c; --thinned: #c77700;
  --archived: #2f6fd0; --removed: #9aa3b2; --gone: #9aa3b2; --limit: #c2342b; --curve: #2f6fd0; --other: #c77700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a2b3; --line: #39414f; --page: #14181f;
  --kept: #3fb98c; --thinned: #eda63b; --archived: #6ea3f2; --removed: #6b7482; --gone: #6b7482; --limit: #f0746b;
  --curve: #6ea3f2; --other: #eda63b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 960px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; } p, td { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.text { max-width: 22rem; } h3 { font-size: 1rem; }
.soft { color: var(--soft); } .key { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -1px; }
"""


def define_report(parser: Parser) -> None:
    """Define `report`."""
    define(parser, _report, "report 3f2a")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--out", metavar="FILE", help="the page (default RUN/report.html)")


def _report(arguments: Namespace) -> int:
    from ..launchers.overview import many_states
    from ..launchers.registry import LOOK_S, launcher_named
    from ..recipes.plan import read_plan

    paths = find_run(arguments.run, newest=True)
    ((plan, _, states),) = many_states([paths], partial(launcher_named, max_age_s=LOOK_S))
    out = Path(arguments.out).expanduser() if arguments.out else paths.report
    files.write_text(out, render_page(plan if plan.problem else read_plan(paths.plan), paths, states))
    print(out)
    return 0


def _check_presence(found: Iterable[CheckpointLifetime], folder: Path) -> list[CheckpointLifetime]:
    """Mark checkpoints that are no longer in *folder* as gone.

    A kill can come between a removal and its record.
    """
    is_there = {one.step for one in committed(folder)}
    return [one if one.end_s is not None or one.step in is_there else replace(one, fate="gone") for one in found]


def render_page(plan: Plan | PlanSummary, paths: RunPaths, states: Mapping[str, Any]) -> str:
    """Return the whole page; it says why where the plan cannot be read."""
    events = timed(ledger.read(paths.ledger_dir, max_steps=_MAX_STEPS))
    scores, subtitle = read_scores(paths), f"run {paths.run_id}"
    if isinstance(plan, Plan):
        subtitle += f" on {plan.site.name}, {plan.inputs.model.num_params:,} parameters"
    else:
        subtitle += f" ({plan.problem})"
    stages = dict.fromkeys(event.stage for _, event in events if isinstance(event, Saved))
    parts = [
        f"<h1>{escape(paths.recipe_name)}</h1><p class=soft>{escape(subtitle)}, in {escape(str(paths.root))}</p>",
        "<h2>Stages</h2>" + _table(("stage", "state", "progress", "reason"), _stage_rows(states)),
    ]
    for stage in stages:
        mine = [(time, event) for time, event in events if event.stage == stage]
        end = max(time for time, _ in mine)
        found = _check_presence(checkpoint_lifetimes(mine), paths.checkpoints(stage))
        parts += [
            f"<h2>Storage of {escape(stage)}</h2>{_draw_storage(mine, end)}",
            f"{_draw_lifetimes(found, end)}{_save_table(mine, found)}",
            f"<h2>Loss of {escape(stage)}</h2>{_draw_losses(mine)}",
        ]
    for name, result in scores.items():
        shown = [who for who in WHO if who in result["scores"]]
        rows = [
            (label(metric), *(format_score(result["scores"][who].get(metric)) for who in shown))
            for metric in result["scores"][MODEL]
        ]
        stage, _, decoding = name.partition("@")
        examples = read_examples(paths.stage_examples(stage, decoding))
        parts.append(f"<h2>{escape(name)}</h2>" + _table(("", *(WHO[who] for who in shown)), rows))
        parts += [f"<h3>{why} rows of {escape(name)}</h3>{_example_table(chosen)}" for why, chosen in examples.items()]
    if isinstance(plan, Plan) and (found_files := result_files(plan, paths)):
        parts.append("<h2>Files</h2>" + _table(("what", "where"), found_files))
    title = escape(f"{paths.recipe_name} {paths.run_id}")
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _stage_rows(states: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, state.word, f"{state.step}/{state.total}" if state.total else "", state.reason)
        for name, state in states.items()
    ]


def _example_table(chosen: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with their texts side by side, each in its own direction."""
    texts = [
        name
        for name in ("input", "target", RAW_PREDICTION, PREDICTION)
        if any(row.get(name) is not None for row in chosen)
    ]
    scores = headlines(chosen[0]["scores"]) if chosen else []
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in (INDEX, *texts, *scores))
    body = "".join(
        f"<tr><td>{escape(str(row[INDEX]))}</td>"
        + "".join(f"<td dir=auto class=text>{escape(cut_text(row.get(name)))}</td>" for name in texts)
        + "".join(f"<td>{format_score(row['scores'].get(name))}</td>" for name in scores)
        + "</tr>"
        for row in chosen
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _save_table(events: Sequence[tuple[float, Event]], found: Sequence[CheckpointLifetime]) -> str:
    """Return a row for each save and each note.

    It has the size, how long training paused, and what became of the save.
    """
    ends = {(lifetime.step, lifetime.attempt): lifetime for lifetime in found}
    rows: list[tuple[object, ...]] = []
    notes: dict[tuple[object, ...], list[float]] = {}  # a note that is repeated, such as at each save, is one row
    for time, event in events:
        if isinstance(event, _NOTES):
            notes.setdefault(_describe_note(event), []).append(time)
    for time, event in events:
        if isinstance(event, Saved):
            lifetime = ends.get((event.step, event.number))  # none where a later attempt saved the same step again
            metric = "" if event.metric is None else f"{event.metric:.4g}"
            rows.append(
                (
                    event.step,
                    event.content or "full",
                    format_size(event.num_bytes or 0),
                    metric,
                    f"{event.stall_s or 0:.2f} s",
                    f"{time:.0f} s",
                    _describe_end(lifetime) if lifetime is not None else "saved again",
                )
            )
        elif isinstance(event, _NOTES) and (times := notes.pop(_describe_note(event), [])):
            step, kind, message = _describe_note(event)
            often = f" (said {len(times)} times, last at {times[-1]:.0f} s)" if len(times) > 1 else ""
            rows.append((step, kind, "", "", "", f"{time:.0f} s", f"{message}{often}"))
    return _table(("step", "saved", "size", "metric", "training paused", "at", "what became of it"), rows)


def _describe_note(event: Skipped | Kept | Problem) -> tuple[object, str, str]:
    step = "" if isinstance(event, Problem) or event.step is None else event.step
    return step, event.kind, event.message or ""


def _describe_end(lifetime: CheckpointLifetime) -> str:
    """Say what became of a checkpoint, when and why."""
    at = lifetime.stripped_s if lifetime.end_s is None else lifetime.end_s
    return (
        _OUTCOMES[lifetime.fate]
        + (f" at {at:.0f} s" if at is not None else "")
        + (f": {lifetime.why}" if lifetime.why else "")
    )


def _scale(values: Iterable[float], low: float, high: float) -> tuple[float, Any]:
    """Return the largest value, and a function that scales.

    The function maps 0 to that value onto *low* to *high*.
    """
    most = max([*values, 1e-12])
    return most, lambda value: low + (high - low) * value / most


def _draw_frame(height: int, top: str, bottom: str, right: str) -> str:
    return (
        f'<line x1={_LEFT} y1={height - 20} x2={_WIDTH - _RIGHT} y2={height - 20} stroke="var(--line)"/>'
        f"<text x={_LEFT - 6} y=18 text-anchor=end>{escape(top)}</text>"
        f"<text x={_LEFT - 6} y={height - 20} text-anchor=end>{escape(bottom)}</text>"
        f"<text x={_WIDTH - _RIGHT} y={height - 5} text-anchor=end>{escape(right)}</text>"
    )


def _draw_storage(events: Sequence[tuple[float, Event]], end: float) -> str:
    """Draw the bytes that the checkpoints held over time.

    Draw also the bytes that they were allowed.
    """
    sizes = [(time, event) for time, event in events if isinstance(event, CheckpointEvent)]
    held = [(time, event.held_bytes) for time, event in sizes if event.held_bytes is not None]
    allowed = [(time, event.budget_bytes) for time, event in sizes if event.budget_bytes]
    height = 200
    most, y = _scale([value for _, value in held], height - 20, 14)
    limits = [value for _, value in allowed]
    if limits:  # a budget far above would flatten the curve
        most, y = _scale([most, min(max(limits), 3 * most)], height - 20, 14)
    _, x = _scale([end], _LEFT, _WIDTH - _RIGHT)
    steps = " ".join(f"H{x(time):.1f} V{y(value):.1f}" for time, value in held)
    line = f'<path d="M{_LEFT} {y(0):.1f} {steps} H{_WIDTH - _RIGHT}" fill=none stroke="var(--curve)" stroke-width=2 />'
    note = f"{format_size(max((value for _, value in held), default=0))} at most"
    if limits and min(limits) <= most:  # cut off at the top where it is further above
        steps = " ".join(f"H{x(time):.1f} V{y(min(value, most)):.1f}" for time, value in allowed)
        line += (
            f'<path d="M{_LEFT} {y(min(limits[0], most)):.1f} {steps} H{_WIDTH - _RIGHT}" fill=none '
            'stroke="var(--limit)" stroke-dasharray="6 4" />'
        )
    if limits and format_size(min(limits)) == format_size(max(limits)):
        note += f" of a budget of {format_size(max(limits))}"
    elif limits:
        note += f"; {format_size(min(limits))} to {format_size(max(limits))} were allowed, as free space changed"
    label = _draw_frame(height, format_size(most), "0", f"{end:.0f} s")
    return f"<p>Held by checkpoints: {note}.</p><svg {_view_box(height)}>{label}{line}</svg>"


def _draw_lifetimes(found: Sequence[CheckpointLifetime], end: float) -> str:
    """Draw the lifetime of each checkpoint, coloured by its outcome.

    The bar is half as high once the checkpoint is stripped.
    """
    _, x = _scale([end], _LEFT, _WIDTH - _RIGHT)
    row = max(4, min(18, 480 // max(1, len(found))))
    drawn = []
    for place, lifetime in enumerate(found):
        stop = _WIDTH - _RIGHT if lifetime.end_s is None else x(lifetime.end_s)
        turn = stop if lifetime.stripped_s is None else x(lifetime.stripped_s)
        top = 4 + place * row
        parts = [(x(lifetime.born_s), turn, row - 3), (turn, stop, max(1, (row - 3) // 2))]
        num_bytes, outcome = format_size(lifetime.num_bytes), _describe_end(lifetime)
        tip = f"step {lifetime.step}, attempt {lifetime.attempt}: {num_bytes}, {outcome}"
        drawn.append(
            f"<g fill='var(--{lifetime.fate})'><title>{escape(tip)}</title>"
            + "".join(
                f"<rect x={left:.1f} y={top} width={max(1.5, right - left):.1f} height={tall} />"
                for left, right, tall in parts
                if right > left or (left, right, tall) == parts[0]
            )
            + "</g>"
        )
        if row >= 10:
            drawn.append(f"<text x={_LEFT - 6} y={top + row - 5} text-anchor=end>step {lifetime.step}</text>")
    return f"{_draw_legend(_OUTCOMES)}<svg {_view_box(row * len(found) + 8)}>{''.join(drawn)}</svg>"


def _draw_losses(events: Sequence[tuple[float, Event]]) -> str:
    """Draw the losses over steps.

    Of a step that was done twice the later value counts.
    """
    curves = {
        name: {
            event.step: event.values[name] for _, event in events if isinstance(event, Step) and name in event.values
        }
        for name in ("loss", "eval_loss")
    }
    finite = {
        name: {step: value for step, value in sorted(curve.items()) if math.isfinite(value)}
        for name, curve in curves.items()
    }
    height = 220
    most, y = _scale([value for curve in finite.values() for value in curve.values()], height - 20, 14)
    last, x = _scale([step for curve in finite.values() for step in curve], _LEFT, _WIDTH - _RIGHT)
    lines = "".join(
        f'<polyline points="{" ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve.items())}" '
        f'fill=none stroke="var(--{colour})" stroke-width=2 />'
        for (_, curve), colour in zip(finite.items(), ("curve", "other"), strict=True)
        if curve
    )
    frame = _draw_frame(height, f"{most:.3g}", "0", f"step {last:.0f}")
    return f"{_draw_legend({'curve': 'training', 'other': 'validation'})}<svg {_view_box(height)}>{frame}{lines}</svg>"


def _draw_legend(words: Mapping[str, str]) -> str:
    """Return what each colour means."""
    marks = (f"<span class=key><i style='background:var(--{one})'></i>{what}</span>" for one, what in words.items())
    return f"<p>{''.join(marks)}</p>"


def _view_box(height: int) -> str:
    return f"viewBox='0 0 {_WIDTH} {height}' role=img"
