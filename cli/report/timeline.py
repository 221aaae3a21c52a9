"""Draw when the stages of a run, or many runs, waited and worked."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .charts import Range, plot, short
from .curves import PACE
from .facts import RunFacts, Span, StageFacts
from .markup import Html, Number, badge, format_date, format_number, format_time, table

_MOST_TASKS = 24  # that have a bar each; more share one
_WORDS = {
    "behind": "waited for earlier stages",
    "queue": "waited for devices",
    "requeue": "waited to start again",
    "done": "done",
    "stopped": "saved and stopped",
    "failed": "failed",
    "running": "runs",
    "killed": "ended without a record",
}


def draw_stages(run: RunFacts) -> str:
    """Return the time line of a run's stages, and the same as a table."""
    rows = [stage for stage in run.stages if stage.spans]
    bars, labels, top = [], [], 4
    for stage in rows:
        tasks = sorted({span.task for span in stage.spans})
        tall = max(5, 16 // len(tasks)) if len(tasks) <= _MOST_TASKS else 16
        lanes = {task: place if len(tasks) <= _MOST_TASKS else 0 for place, task in enumerate(tasks)}
        bars += [_bar(span, top + lanes[span.task] * tall, tall - 1, _tip(stage, span)) for span in stage.spans]
        high = tall * (max(lanes.values()) + 1)
        labels.append(f"<text x=-8 y={top + high // 2} dy=4>{escape(stage.name)}</text>")
        top += high + 8
    chart = _time_plot("Stages over time", bars, labels, top, run.end_s, _kinds(rows)) if rows else ""
    return chart + _stage_table(run)


def draw_runs(runs: Sequence[RunFacts], keys: Sequence[str]) -> str:
    """Return when each of many runs worked, over a common time."""
    began = min(run.began_at for run in runs)
    tall = max(3, min(16, 480 // len(runs)))
    bars, labels, top, end = [], [], 4, 0.0
    for run, key in zip(runs, keys, strict=True):
        late = run.began_at - began
        spans = [(stage, span) for stage in run.stages for span in stage.spans if span.kind != "behind"]
        for stage, span in sorted(spans, key=lambda pair: pair[1].number > 0):  # no wait covers what ran meanwhile
            tip = f"{run.label}: {_tip(stage, span)}"
            bars.append(_bar(span, top, tall - 1, tip, late=late, key=key if span.number else ""))
            end = max(end, late + span.end_s)
        if tall >= 12:
            labels.append(f"<text x=-8 y={top + tall // 2} dy=4>{escape(short(run.label, 16))}</text>")
        top += tall
    return _time_plot("Runs over time", bars, labels, top + 4, end, []) if bars else ""


def _time_plot(
    title: str, bars: Sequence[str], labels: Sequence[str], height: int, end: float, kinds: Sequence[str]
) -> str:
    legend = "".join(f'<span class="mark {kind}">{_WORDS[kind]}</span>' for kind in kinds)
    return plot(
        title=title,
        seen=Range(left=0, right=end or 1, low=-height, high=0),
        inside="".join(bars),
        beside=f"<g class=y>{''.join(labels)}</g>",
        x="s",
        height=height,
        legend=f"<span class=legend>{legend}</span>" if kinds else "",
        classes=("bars",),
    )


def _bar(span: Span, top: float, tall: float, tip: str, *, late: float = 0, key: str = "") -> str:
    wide, thin = span.end_s - span.start_s, span.number == 0
    place = f"x={span.start_s + late:.2f} y={top + (tall / 3 if thin else 0):.1f}"
    size = f"width={max(wide, 0):.2f} height={tall / 3 if thin else tall:.1f}"
    return f'<rect class="{span.kind} {key}" {place} {size}><title>{escape(tip)}</title></rect>'


def _tip(stage: StageFacts, span: Span) -> str:
    many = f" task {span.task}" if any(one.task for one in stage.spans) else ""
    attempt = f", attempt {span.number}" if span.number else ""
    host = f" on {span.host}" if span.host else ""
    code = f" with exit code {span.exit_code}" if span.kind == "failed" else ""
    return f"{stage.name}{many}{attempt}: {_WORDS[span.kind]}{code}, {format_time(span.end_s - span.start_s)}{host}"


def _kinds(stages: Sequence[StageFacts]) -> list[str]:
    found = {span.kind for stage in stages for span in stage.spans}
    return [kind for kind in _WORDS if kind in found]


def _stage_table(run: RunFacts) -> str:
    rows = []
    for stage in run.stages:
        state = stage.state
        progress = f"{state.step:,} of {state.total:,}" if state and state.total else ""
        starts = len(stage.attempts) / max(1, len({span.task for span in stage.attempts}))
        begun = min((span.start_s for span in stage.attempts), default=None)
        rows.append(
            (
                stage.name,
                Html(badge(state.word)) if state else "",
                Number(progress, state.step if state else None),
                Number("" if begun is None else format_date(run.began_at + begun), begun),
                _duration(stage.waited_s),
                _duration(stage.ran_s),
                Number(f"{starts:.3g}" if starts else "", starts),
                _pace(stage),
                state.reason if state else "",
            )
        )
    return table(("stage", "state", "progress", "began", "waited", "ran", "attempts", "pace", "reason"), rows)


def _duration(seconds: float) -> Number:
    return Number(format_time(seconds) if seconds >= 0.05 else "", seconds)


def _pace(stage: StageFacts) -> Number:
    """Return the examples trained on, or the rows predicted, in a second."""
    if stage.rows_per_s is not None:
        return Number(f"{format_number(stage.rows_per_s)} rows/s", stage.rows_per_s)
    values = sorted(value for _, value in stage.curves.get(PACE, ()))
    middle = values[len(values) // 2] if values else None
    return Number("" if middle is None else f"{format_number(middle)} examples/s", middle)
