"""Draw what sets several runs apart: values, scores, curves, and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from ...launchers.history import RunRow, differing
from ...predictions.metrics import is_lower_better
from ...predictions.scoring import MODEL, headlines
from ..results import format_score
from ..run_table import columns_of
from .charts import Line, line_chart, scatter_chart
from .curves import EVAL_LOSS, LOSS, thin_out
from .facts import RunFacts
from .markup import Cell, Html, Number, badge, format_number, section, table
from .samples import same_rows
from .single import title_of, unit_of
from .timeline import draw_runs

# One accent a run, for light and for dark pages; of more runs each has its place between the best and the last.
_COLOURS = (
    ("#2463c9", "#74a7f7"),
    ("#c25e0a", "#f2a14f"),
    ("#17795a", "#41bd8f"),
    ("#7746bd", "#b596f2"),
    ("#b92d5d", "#f27fa2"),
    ("#0b7285", "#4fc3d6"),
    ("#75700a", "#c9c45c"),
    ("#7d5138", "#cb9f80"),
)
_MOST_KEYS = 6  # that have a column each; more stand in one
_MOST_SIDE_BY_SIDE = 8  # runs whose recipes, or whose answers to the same rows, stand beside each other
_MOST_SCATTERED = 4
_MOST_ROWS = 16  # of a table that does not scroll
_MOST_DIGITS = 9


def palette(num_runs: int) -> str:
    """Return the style that gives each run its colour."""
    if num_runs <= len(_COLOURS):
        light = "".join(f".k{place}{{--k:{one[0]}}}" for place, one in enumerate(_COLOURS[:num_runs]))
        dark = "".join(f".k{place}{{--k:{one[1]}}}" for place, one in enumerate(_COLOURS[:num_runs]))
        return f"{light}@media(prefers-color-scheme:dark){{{dark}}}"
    hues = (round(216 - 196 * place / (num_runs - 1)) for place in range(num_runs))
    return "".join(f".k{place}{{--k:hsl({hue} var(--vivid))}}" for place, hue in enumerate(hues))


def keys_of(runs: Sequence[RunFacts]) -> list[str]:
    """Return the class of each run."""
    return [f"k{place}" for place in range(len(runs))]


def best_first(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Return runs by their first score; those without one come last."""
    name = main_score(runs)
    if name is None:
        return list(runs)
    sign = 1 if is_lower_better(name) else -1
    return sorted(
        runs, key=lambda run: min((sign * row.scores.get(name, math.inf * sign) for row in run.rows), default=math.inf)
    )


def main_score(runs: Sequence[RunFacts]) -> str | None:
    """Return the name of the first score that one of the runs has."""
    for run in runs:
        for one in run.samples:
            for metric in headlines(one.scores[MODEL]):
                for name in (metric, f"{one.name.partition('@')[0]}/{metric}"):  # as the rows of several stages call it
                    if any(name in row.scores for row in run.rows):
                        return name
    return None


def draw_comparison(runs: Sequence[RunFacts], num_points: int, num_characters: int) -> str:
    """Return the sections that show several runs together."""
    rows = same_rows(runs, keys_of(runs), most=num_characters) if len(runs) <= _MOST_SIDE_BY_SIDE else ""
    return "".join(
        (
            section("Runs", compare_runs(runs)),
            section("Curves", compare_curves(runs, num_points)),
            section("Values and scores", scatter(runs)),
            section("Differences", compare_recipes(runs)),
            section("Time", draw_runs(runs, keys_of(runs))),
            section("The same rows", rows),
        )
    )


def compare_runs(runs: Sequence[RunFacts]) -> str:
    """Return a row for each run or decoding, with the best scores marked."""
    keys = {run.paths.root: (key, run) for run, key in zip(runs, keys_of(runs), strict=True)}
    rows = [replace(row, state=run.state) for run in runs for row in run.rows]
    columns = columns_of(rows, most_keys=_MOST_KEYS)
    best = {name: _best(rows, name) for name in columns}
    lines, classes = [], []
    for row in rows:
        key, run = keys[row.folder]
        cells: list[Cell] = []
        for name, get in columns.items():
            if name == "run":
                cells.append(Html(f'<span class="mark {key}" title="{escape(row.run)}">{escape(run.label)}</span>'))
            elif name == "state":
                cells.append(Html(badge(row.state)))
            else:
                cells.append(_cell(name, get(row), row, best[name]))
        lines.append(cells)
        classes.append(key)
    return table(tuple(columns), lines, kind="runs sortable", keys=classes, is_tall=len(lines) > _MOST_ROWS)


def _cell(name: str, value: object, row: RunRow, best: float | None) -> Cell:
    if name in row.scores and isinstance(value, float):
        return Number(format_score(value), value, is_best=value == best)
    if name == "steps":
        return Number(str(value), float(row.step))
    if name == "holds":
        return Number(str(value), float(row.held_bytes))
    if isinstance(value, float):
        return Number(f"{value:.2f}" if name in ("device hours", "cost") else format_number(value), value)
    if value is None:
        return Number("", None)
    number = _number(value)
    if number is None:
        return str(value)
    return Number(str(value) if len(str(value)) <= _MOST_DIGITS else f"{number:.4g}", number)


def _number(value: object) -> float | None:
    """Return a number that stands as text, such as a learning rate."""
    try:
        return float(str(value))
    except ValueError:
        return None


def _best(rows: Sequence[RunRow], name: str) -> float | None:
    values = [row.scores[name] for row in rows if name in row.scores]
    return (min if is_lower_better(name) else max)(values) if len(set(values)) > 1 else None


def compare_curves(runs: Sequence[RunFacts], num_points: int) -> str:
    """Return a chart for each value that training reports, with a line for each run."""
    found = [run.training.curves if run.training else {} for run in runs]
    names = list(dict.fromkeys(name for curves in found for name in curves))
    each = max(4, num_points // max(1, len(names) * len(runs)))
    charts = []
    for name in names:
        lines = [
            Line(points=thin_out(curves[name], each // 2), label=run.label, key=key, has_dots=name.startswith("eval_"))
            for run, key, curves in zip(runs, keys_of(runs), found, strict=True)
            if name in curves
        ]
        is_loss = name in (LOSS, EVAL_LOSS)
        chart = line_chart(
            lines, title=title_of(name), y=unit_of(name), height=240 if is_loss else 160, with_names=is_loss
        )
        charts.append(chart)
    return f"<div class=charts>{''.join(charts)}</div>" if charts else ""


def scatter(runs: Sequence[RunFacts]) -> str:
    """Return the first score over each numeric value in which the runs differ."""
    name = main_score(runs)
    pairs = [(row, key) for run, key in zip(runs, keys_of(runs), strict=True) for row in run.rows if name in row.scores]
    if name is None or len(pairs) < 3:
        return ""
    charts = []
    for value in differing([row for row, _ in pairs]):
        dots = [
            (row.values[value], row.scores[name], key, row) for row, key in pairs if _is_number(row.values.get(value))
        ]
        if len({dot[0] for dot in dots}) >= 3 and len(dots) == len(pairs) and value != "seed":
            labels = {run.paths.root: run.label for run in runs}
            charts.append(
                scatter_chart(
                    [(float(x), y, key, labels[row.folder]) for x, y, key, row in dots],
                    title=f"{name} by {value}",
                )
            )
    return f"<div class=charts>{''.join(charts[:_MOST_SCATTERED])}</div>" if charts else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def compare_recipes(runs: Sequence[RunFacts]) -> str:
    """Return the keys of the recipes that are not the same in all runs."""
    firsts = [(run, run.rows[0]) for run in runs if run.rows]
    keys = differing([row for _, row in firsts])
    if not keys:
        return ""
    if len(firsts) <= _MOST_SIDE_BY_SIDE:
        rows: list[list[Cell]] = [[key, *(_value(row.values.get(key)) for _, row in firsts)] for key in keys]
        return table(("key", *(run.label for run, _ in firsts)), rows, kind="keys")
    counted: list[list[Cell]] = []
    for key in keys:
        values = [row.values.get(key) for _, row in firsts]
        kinds = dict.fromkeys(map(_value, values))
        counted.append([key, Number(str(len(kinds)), len(kinds)), _describe_values(list(kinds), values)])
    return table(("key", "values", "which"), counted, kind="keys")


def _describe_values(kinds: Sequence[str], values: Sequence[object]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(kinds) > _MOST_SIDE_BY_SIDE and len(numbers) == len(values):
        return f"{format_number(min(numbers))} to {format_number(max(numbers))}"
    return ", ".join(kinds[:_MOST_SIDE_BY_SIDE]) + (" …" if len(kinds) > _MOST_SIDE_BY_SIDE else "")


def _value(value: object) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
