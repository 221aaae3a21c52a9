"""Read what the page of one or more runs shows, from their folders and launchers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from ... import ledger
from ...checkpoints.commit import committed
from ...errors import SousbatchError, UsageError
from ...events import Event
from ...launchers.base import FINAL_WORDS, JobState
from ...launchers.history import RunRow, differing, read_history
from ...launchers.overview import many_states
from ...launchers.registry import LOOK_S, launcher_named
from ...launchers.states import StageState, is_final, stage_states, word_of
from ...launchers.status import point_states
from ...ledger_queries import CheckpointLifetime, by_stage, checkpoint_lifetimes, timed
from ...predictions.rows import predictions_of
from ...predictions.selection import NUM_EXAMPLES, read_examples
from ...recipes.data.chat import input_of
from ...recipes.data.rows import read_rows
from ...recipes.decodings import decodings_of
from ...recipes.plan import Plan, Stage, read_plan
from ...recipes.plan_summary import PlanSummary, read_summary
from ...recipes.reference import differences
from ...recipes.schema import Recipe
from ...recipes.site_file import device_hour_price
from ...recipes.stage_kinds import STAGE_KINDS
from ...redaction import redacted
from ...run_folder import RunPaths, is_point
from ..results import Shown, places_of, read_scores, result_files
from ..status import log_tail
from ..tables import format_value
from .curves import curves_of
from .facts import (
    Asked,
    Failure,
    RunFacts,
    Samples,
    Span,
    StageFacts,
    Timed,
    rows_per_s,
    spans_of,
    storage_of,
)

_MAX_STEPS = 40_000  # of all runs of a page: parsing that many lines takes half a second
_LEAST_STEPS = 300  # of each run
_LABEL_CHARACTERS = 32
_Point = tuple[RunPaths, str, str]  # a run, its label and its state where they are known


def gather(runs: Sequence[RunPaths]) -> tuple[list[RunFacts], Asked]:
    """Return what a page shows of *runs*.

    A sweep has those of its points that have begun.
    """
    found = list[_Point]()
    num_waiting, notes, places = 0, [], list[Shown]()
    points_of = cache(_points_of)  # of points that are named by their folders each sweep is read once
    for paths in dict.fromkeys(runs):
        points, waiting = points_of(paths)
        num_waiting += waiting
        found += points if points or waiting else [_alone(paths, points_of)]
        if points:
            is_over = not waiting and all(word in FINAL_WORDS for _, _, word in points)
            places += places_of(paths, (), is_over=is_over)  # each point is published for itself
        if waiting:
            notes += [one.reason for one in _states(paths).values() if one.reason]
    names = tuple(paths.run_id for paths in runs)
    asked = Asked(names=names, num_waiting=num_waiting, notes=tuple(notes), places=places)
    rows = _rows_by_folder([paths for paths, _, _ in found])
    labels = _labels(found, rows)
    max_steps = max(_LEAST_STEPS, _MAX_STEPS // max(1, len(found)))
    facts = [
        read_run(paths, rows.get(paths.root, ()), label=label, state=state, max_steps=max_steps)
        for (paths, _, state), label in zip(found, labels, strict=True)
    ]
    return facts, asked


def _alone(paths: RunPaths, points_of: Callable[[RunPaths], tuple[list[_Point], int]]) -> _Point:
    """Return a run; of a point that is named by its folder label and state, too."""
    points = points_of(RunPaths(root=paths.runs_dir))[0] if is_point(paths) else []
    return next((point for point in points if point[0] == paths), (paths, "", ""))


def _points_of(paths: RunPaths) -> tuple[list[_Point], int]:
    """Return the points of a sweep that have begun, and how many have not."""
    summary = read_summary(paths.plan)
    if not summary.is_sweep or summary.problem:
        return [], 0
    points = point_states(read_plan(paths.plan), paths)
    if any(point.word == "running" for point in points) and is_final(_states(paths)):
        points = point_states(read_plan(paths.plan), paths, is_over=True)
    begun = {point.folder: point for point in points if point.folder is not None}  # of two alike one is enough
    waiting = sum(point.word == "waiting" for point in points)
    return [(RunPaths(root=folder), point.label, point.word) for folder, point in begun.items()], waiting


def _rows_by_folder(runs: Sequence[RunPaths]) -> dict[Path, tuple[RunRow, ...]]:
    found: dict[Path, tuple[RunRow, ...]] = {}
    for row in read_history(runs, partial(launcher_named, max_age_s=LOOK_S)):
        found[row.folder] = (*found.get(row.folder, ()), row)
    return found


def _labels(found: Sequence[_Point], rows: Mapping[Path, Sequence[RunRow]]) -> list[str]:
    """Return a short name for each run: what sets it apart, else its id."""
    firsts = [rows[paths.root][0] for paths, _, _ in found if rows.get(paths.root)]
    keys = differing(firsts)
    labels = []
    for paths, label, _ in found:
        values = rows[paths.root][0].values if rows.get(paths.root) else {}
        if not label and 0 < len(keys) <= 2:
            label = ", ".join(f"{key.rpartition('.')[2]}={format_value(values.get(key))}" for key in keys)
        labels.append(label if 0 < len(label) <= _LABEL_CHARACTERS else paths.run_id)
    return [
        label if labels.count(label) == 1 else paths.run_id for label, (paths, _, _) in zip(labels, found, strict=True)
    ]


def read_run(
    paths: RunPaths,
    rows: Sequence[RunRow] = (),
    *,
    label: str = "",
    state: str = "",
    max_steps: int = _MAX_STEPS,
    states: Mapping[str, StageState] | None = None,
) -> RunFacts:
    """Return what a page shows of one run.

    Without *states* the run's launcher is asked; a point of a sweep, whose *state* is known, has none of its own.
    """
    events = ledger.read(paths.ledger_dir, max_steps=max_steps)
    summary = read_summary(paths.plan)
    plan, problem = _plan(paths, summary)
    if states is None:
        states = _states_of_point(summary, events, state) if state else _states(paths)
    now = time.time()
    began_at = min((event.time for event in events), default=now)
    moments = timed(events)
    is_open = any(one.word in ("running", "stopping", "waiting") for one in states.values())
    end_s = max([now - began_at if is_open else 0.0, *(moment for moment, _ in moments)])
    return RunFacts(
        paths=paths,
        label=label or paths.run_id,
        state=state or (rows[0].state if rows else word_of(one.word for one in states.values())),
        stages=_stages(plan, summary, paths, moments, states, end_s),
        rows=tuple(rows),
        began_at=began_at,
        end_s=end_s,
        plan=plan,
        problem=problem,
        samples=_samples(plan, paths),
        bare=_bare_rows(plan, paths) if plan and not read_scores(paths) else (),
        failure=_failure(paths, states),
        files=result_files(plan, paths) if plan else (),
        places=places_of(paths, events, is_over=not is_open),
        folder=str(paths.root),
        price=device_hour_price(),
        recipe=_text(paths.recipe),
        changes=differences(Recipe(), plan.recipe) if plan else (),
    )


def _plan(paths: RunPaths, summary: PlanSummary) -> tuple[Plan | None, str]:
    """Return the plan of a run, or why it cannot be read whole."""
    try:
        return (None, summary.problem) if summary.problem else (read_plan(paths.plan), "")
    except UsageError as error:  # damaged, or of a version between ours and the last one
        return None, str(error)


def _states(paths: RunPaths) -> Mapping[str, StageState]:
    ((_, _, states),) = many_states([paths], partial(launcher_named, max_age_s=LOOK_S))
    return states


def _states_of_point(summary: PlanSummary, events: Sequence[Event], state: str) -> dict[str, StageState]:
    """Return the states of the stages of a sweep's point.

    It has no jobs of its own. Its stages run one after another: one that has not begun waits while the point runs.
    """
    gone = {stage.name: JobState(word="lost") for stage in summary.stages}
    found, mine = stage_states(summary, events, gone), by_stage(events)
    if state == "running":
        for name, one in found.items():
            if one.word == "lost":
                found[name] = replace(one, word="running" if mine.get(name) else "waiting")
    return found


def _stages(
    plan: Plan | None,
    summary: PlanSummary,
    paths: RunPaths,
    moments: Timed,
    states: Mapping[str, StageState],
    end_s: float,
) -> tuple[StageFacts, ...]:
    """Return the stages of the plan, and those that the ledger knows beside them."""
    mine: dict[str, list[tuple[float, Event]]] = {}
    for moment, event in moments:
        mine.setdefault(event.stage, []).append((moment, event))
    planned = {stage.name: stage for stage in plan.stages} if plan else {}
    found: list[StageFacts] = []
    ended: dict[str, float] = {}
    for name in dict.fromkeys([*(stage.name for stage in summary.stages), *states, *filter(None, mine)]):
        stage, word = planned.get(name), states[name].word if name in states else ""
        before = [item.stage for item in stage.after] if stage else list(ended)  # of a plan that cannot be read: all
        ready_s = max((ended.get(one, 0.0) for one in before), default=0.0)
        spans = spans_of(mine.get(name, []), ready_s=ready_s, end_s=end_s, word=word)
        is_open = word in ("running", "stopping", "waiting")
        ended[name] = end_s if is_open else max((span.end_s for span in spans), default=0.0)
        found.append(_stage(name, mine.get(name, []), spans, stage, states.get(name), paths))
    return tuple(found)


def _stage(
    name: str, events: Timed, spans: tuple[Span, ...], stage: Stage | None, state: StageState | None, paths: RunPaths
) -> StageFacts:
    global_batch = stage.batch.global_batch if stage and stage.batch else None
    lifetimes = _check_presence(checkpoint_lifetimes(events), paths.checkpoints(name))
    return StageFacts(
        name=name,
        state=state,
        spans=spans,
        curves=curves_of([event for _, event in events], global_batch=global_batch),
        storage=storage_of(events, lifetimes),
        rows_per_s=rows_per_s(events),
    )


def _check_presence(found: Iterable[CheckpointLifetime], folder: Path) -> list[CheckpointLifetime]:
    """Mark checkpoints that are no longer in *folder* as gone.

    A kill can come between a removal and its record.
    """
    found = list(found)
    is_there = {one.step for one in committed(folder)} if found else set()
    return [one if one.end_s is not None or one.step in is_there else replace(one, fate="gone") for one in found]


def _samples(plan: Plan | None, paths: RunPaths) -> tuple[Samples, ...]:
    """Return what each score stage found, its decodings in the order of the recipe."""
    order = [
        f"{stage.name}{way and '@'}{way}"
        for stage in (plan.stages if plan else ())
        for way in decodings_of(stage.settings)
    ]
    scores = read_scores(paths)
    return tuple(
        Samples(
            name=name,
            split=str(scores[name]["split"]),
            num_rows=int(scores[name]["num_rows"]),
            scores=scores[name]["scores"],
            rows=read_examples(paths.stage_examples(*name.split("@", 1))),
        )
        for name in dict.fromkeys([*order, *scores])
        if name in scores
    )


def _bare_rows(plan: Plan, paths: RunPaths) -> list[dict[str, Any]]:
    """Return the first rows of the merged predictions, with their inputs."""
    for stage in plan.stages:
        if STAGE_KINDS[stage.kind].leaves != "predictions":
            continue
        for path in (paths.predictions_file(stage.name, name) for name in decodings_of(stage.settings)):
            with suppress(SousbatchError, OSError, ValueError, StopIteration):  # not merged, or its data has moved
                rows = read_rows(Path(stage.splits["predict"].path)) if "predict" in stage.splits else iter(())
                return [
                    one.to_json() | {"input": input_of(stage.settings.data, row), "scores": {}}
                    for one, row in islice(zip(predictions_of(read_rows(path), path), rows, strict=False), NUM_EXAMPLES)
                ]
    return []


def _failure(paths: RunPaths, states: Mapping[str, StageState]) -> Failure | None:
    """Return why a run failed; a point is resumed by its sweep."""
    again = paths.runs_dir.name if is_point(paths) else paths.run_id
    for name, state in states.items():
        if state.word == "failed":
            advice = state.advice or f"`sousbatch resume {again}` resumes it"
            return Failure(stage=name, reason=state.reason, log=redacted(log_tail(paths, name)), advice=advice)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
