"""Draw what checkpoints held against their budget, and the life of each."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ...events import Kept, Problem, Saved, Skipped
from ...ledger_queries import CheckpointLifetime
from ..tables import format_size
from .charts import Line, Range, line_chart, plot
from .curves import thin_out
from .facts import StorageFacts
from .markup import Cell, Number, folded, format_number, format_time, table

FATES = {
    "kept": "still there",
    "thinned": "stripped to its weights",
    "archived": "moved to the archive",
    "removed": "removed",
    "gone": "no longer there",
}
_NOTES = (Skipped, Kept, Problem)
_MOST_ROWS = 12  # of a table that is not folded


def draw_storage(facts: StorageFacts, *, stage: str, num_points: int, end_s: float) -> str:
    """Return bytes over time, the life of each checkpoint, and a table of all saves."""
    held, allowed = [value for _, value in facts.held], [value for _, value in facts.allowed]
    most = max(held, default=0)
    end = max((time for time, _ in facts.events), default=end_s)
    lines = [Line(points=_until(thin_out(facts.held, num_points), end), label="held", key="held", is_step=True)]
    note = f"{format_size(most)} at most"
    if allowed:
        top = max(most, min(max(allowed), 3 * most))  # a budget far above would flatten the curve
        if min(allowed) <= top:
            points = tuple((time, min(value, top)) for time, value in thin_out(facts.allowed, num_points))
            lines.append(Line(points=_until(points, end), label="budget", key="limit", is_step=True))
        if format_size(min(allowed)) == format_size(max(allowed)):
            note += f" of a budget of {format_size(max(allowed))}"
        else:
            note += f"; {format_size(min(allowed))} to {format_size(max(allowed))} were allowed, as free space changed"
    rows = _save_rows(facts)
    saves = table(("step", "saved", "size", "metric", "training paused", "at", "what became of it"), rows)
    return (
        f"<p class=said>Held by checkpoints: {note}.</p>"
        + line_chart(lines, title=f"Storage of {stage}", x="s", y="B", height=160, right=end)
        + _draw_lifetimes(facts.lifetimes, end, stage)
        + (saves if len(rows) <= _MOST_ROWS else folded(f"All saves of {stage} ({len(rows)})", saves))
    )


def _until(points: Sequence[tuple[float, float]], end: float) -> tuple[tuple[float, float], ...]:
    return (*points, (end, points[-1][1])) if points else ()


def _draw_lifetimes(found: Sequence[CheckpointLifetime], end: float, stage: str) -> str:
    """Draw the lifetime of each checkpoint, coloured by its end.

    The bar is half as high once the checkpoint is stripped.
    """
    tall = max(4, min(16, 400 // max(1, len(found))))
    bars, labels = [], []
    for place, life in enumerate(found):
        stop = end if life.end_s is None else life.end_s
        turn = stop if life.stripped_s is None else life.stripped_s
        top = 4 + place * tall
        tip = (
            f"step {life.step}, attempt {life.attempt}: {format_size(life.num_bytes)}, saved after "
            f"{format_time(life.born_s)}, {describe_end(life)}"
        )
        parts = [(life.born_s, turn, tall - 2.0), (turn, stop, max(1.0, (tall - 2) / 2))]
        drawn = (
            f"<rect x={left:.2f} y={top} width={max(0.0, right - left):.2f} height={high} />"
            for left, right, high in parts
            if right > left or (left, right, high) == parts[0]
        )
        bars.append(f'<g class="{life.fate}"><title>{escape(tip)}</title>{"".join(drawn)}</g>')
        if tall >= 12:
            labels.append(f"<text x=-8 y={top + tall // 2 - 1} dy=4>step {life.step:,}</text>")
    fates = [fate for fate in FATES if any(life.fate == fate for life in found)]
    legend = "".join(f'<span class="mark {fate}">{FATES[fate]}</span>' for fate in fates)
    height = tall * len(found) + 8
    return plot(
        title=f"Checkpoints of {stage}",
        seen=Range(left=0, right=end or 1, low=-height, high=0),
        inside="".join(bars),
        beside=f"<g class=y>{''.join(labels)}</g>",
        x="s",
        height=height,
        legend=f"<span class=legend>{legend}</span>",
        classes=("bars",),
    )


def _save_rows(facts: StorageFacts) -> list[tuple[Cell, ...]]:
    """Return a row for each save and each note.

    A note that is repeated, such as at each save, is one row.
    """
    ends = {(life.step, life.attempt): life for life in facts.lifetimes}
    notes: dict[tuple[object, ...], list[float]] = {}
    for time, event in facts.events:
        if isinstance(event, _NOTES):
            notes.setdefault(_describe_note(event), []).append(time)
    rows: list[tuple[Cell, ...]] = []
    for time, event in facts.events:
        if isinstance(event, Saved):
            life = ends.get((event.step, event.number))  # none where a later attempt saved the same step again
            rows.append(
                (
                    Number(f"{event.step:,}", event.step),
                    event.content or "full",
                    Number(format_size(event.num_bytes or 0), event.num_bytes),
                    Number("" if event.metric is None else format_number(event.metric), event.metric),
                    Number(f"{event.stall_s or 0:.2f} s", event.stall_s),
                    Number(format_time(time), time),
                    "saved again" if life is None else describe_end(life),
                )
            )
        elif isinstance(event, _NOTES) and (times := notes.pop(_describe_note(event), [])):
            step, kind, message = _describe_note(event)
            often = f" (said {len(times)} times, last at {format_time(times[-1])})" if len(times) > 1 else ""
            at = Number(format_time(time), time)
            rows.append((Number("" if step is None else f"{step:,}", step), kind, "", "", "", at, f"{message}{often}"))
    return rows


def _describe_note(event: Skipped | Kept | Problem) -> tuple[int | None, str, str]:
    return None if isinstance(event, Problem) else event.step, event.kind, event.message or ""


def describe_end(life: CheckpointLifetime) -> str:
    """Say what became of a checkpoint, when and why."""
    at = life.stripped_s if life.end_s is None else life.end_s
    return (
        FATES[life.fate] + (f" at {format_time(at)}" if at is not None else "") + (f": {life.why}" if life.why else "")
    )
