"""Derive what the page of a run shows from its events. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import EXIT_STOPPED
from ...events import CheckpointEvent, Ended, Event, Sent, Started, UnitCommitted
from ...launchers.history import RunRow
from ...launchers.states import StageState
from ...ledger_queries import CheckpointLifetime
from ...recipes.plan import Plan
from ...run_folder import RunPaths
from ..results import Shown
from .curves import Points

Timed = Sequence[tuple[float, Event]]
SpanKind = Literal["behind", "queue", "requeue", "done", "stopped", "failed", "running", "killed"]
WAITS = ("queue", "requeue")


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a stage's time, in seconds from the run's first event.

    "behind" waits for earlier stages, "queue" for devices, "requeue" for another start of the same job. The others are
    attempts, by how they ended; one that was "killed" could not record its end.
    """

    kind: SpanKind
    task: int
    start_s: float
    end_s: float
    number: int = 0
    host: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True)
class StorageFacts:
    """What the checkpoints of a train stage held and were allowed.

    *held* and *allowed* are (seconds, bytes); *events* are all of the stage's.
    """

    held: Points
    allowed: Points
    lifetimes: tuple[CheckpointLifetime, ...]
    events: Timed


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """A stage of a run.

    *rows_per_s* is what its tasks predicted together in a second, while they worked.
    """

    name: str
    state: StageState | None = None
    spans: tuple[Span, ...] = ()
    curves: Mapping[str, Points] = field(default_factory=dict)
    storage: StorageFacts | None = None
    rows_per_s: float | None = None

    @property
    def waited_s(self) -> float:
        """The longest time that one of its tasks waited for devices."""
        return _longest(span for span in self.spans if span.kind in WAITS)

    @property
    def ran_s(self) -> float:
        """The longest time that one of its tasks ran."""
        return _longest(self.attempts)

    @property
    def attempts(self) -> list[Span]:
        """The attempts of all tasks."""
        return [span for span in self.spans if span.number]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The scores of a score stage, or of one decoding.

    *rows* are some of it, by why they were chosen.
    """

    name: str
    split: str
    num_rows: int
    scores: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a stage failed, the end of its log, and what helps."""

    stage: str
    reason: str
    log: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run as a page shows it.

    *rows* are those of `sousbatch runs`, one a decoding. *began_at* is the time of its first event in seconds since the
    epoch. *plan* is None where it cannot be read; *problem* then says why. *bare* are rows of predictions that nothing
    has scored. *folder* is where the run lies, "" on a page for readers who do not know this machine; *price* is that
    of a device hour.
    """

    paths: RunPaths
    label: str
    state: str
    stages: tuple[StageFacts, ...]
    rows: tuple[RunRow, ...] = ()
    began_at: float = 0.0
    end_s: float = 0.0
    plan: Plan | None = None
    problem: str = ""
    samples: tuple[Samples, ...] = ()
    bare: Sequence[Mapping[str, Any]] = ()
    failure: Failure | None = None
    files: Sequence[tuple[str, Path]] = ()
    places: Sequence[Shown] = ()
    folder: str = ""
    price: float | None = None
    recipe: str = ""
    changes: Sequence[tuple[str, Any, Any]] = ()

    @property
    def training(self) -> StageFacts | None:
        """The last stage with curves, if there is one."""
        return next((stage for stage in reversed(self.stages) if stage.curves), None)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a page was asked to show.

    *num_waiting* points of sweeps have not begun; *notes* say why. *places* are where the sweeps are shown.
    """

    names: tuple[str, ...]
    num_waiting: int = 0
    notes: tuple[str, ...] = ()
    places: Sequence[Shown] = ()


def spans_of(events: Timed, *, ready_s: float, end_s: float, word: str) -> tuple[Span, ...]:
    """Return how each task of a stage spent its time.

    *events* are the stage's. The stages before it had ended at *ready_s*; *end_s* is now, until which it waits or runs
    where the *word* of its state says so.
    """
    sent = [time for time, event in events if isinstance(event, Sent)]
    attempts: dict[tuple[int, int], list[tuple[float, Event]]] = {}
    for time, event in events:
        if event.role != "client":
            attempts.setdefault((event.task, event.number), []).append((time, event))
    found: list[Span] = []
    for task in sorted({task for task, _ in attempts}) or [0]:
        own = [attempts[key] for key in sorted(attempts) if key[0] == task]
        found += _task_spans(task, own, sent, ready_s, end_s, word)
    return tuple(found)


def _task_spans(
    task: int, attempts: Sequence[Timed], sent: Sequence[float], ready_s: float, end_s: float, word: str
) -> list[Span]:
    found: list[Span] = []
    for place, own in enumerate(attempts):
        is_newest = place == len(attempts) - 1
        attempt = _attempt_span(task, own, end_s if is_newest and word in ("running", "stopping") else None)
        found += _waits(task, found, sent, ready_s, attempt.start_s)
        found.append(attempt)
    is_over = bool(found) and found[-1].kind == "done"
    if word == "waiting" and sent and not is_over:
        found += _waits(task, found, sent, ready_s, end_s)
    return [span for span in found if span.end_s > span.start_s or span.number]


def _attempt_span(task: int, events: Timed, running_until: float | None) -> Span:
    start = min(time for time, _ in events)
    started = next((event for _, event in events if isinstance(event, Started)), None)
    ends = [(time, event) for time, event in events if isinstance(event, Ended)]
    kind: SpanKind = "running" if running_until is not None else "killed"
    end = max(time for time, _ in events) if running_until is None else running_until
    code = None
    if ends:
        end, code = ends[-1][0], ends[-1][1].exit_code
        kind = "done" if code == 0 else "stopped" if code == EXIT_STOPPED else "failed"
    host = (started.host if started else "") or ""
    return Span(kind=kind, task=task, start_s=start, end_s=end, number=events[0][1].number, host=host, exit_code=code)


def _waits(task: int, before: Sequence[Span], sent: Sequence[float], ready_s: float, until_s: float) -> list[Span]:
    """Return what a task waited for, *until_s*.

    It is counted from its submission, or from its last attempt. While nothing was submitted it did not wait.
    """
    last = max((span.end_s for span in before if span.number), default=-math.inf)
    again = [time for time in sent if last < time <= until_s]
    if again:
        start = again[-1] if before else again[0]
    elif before:
        return [Span(kind="requeue", task=task, start_s=last, end_s=until_s)]
    else:
        return []
    middle = min(max(start, ready_s), until_s)
    return [
        Span(kind="behind", task=task, start_s=start, end_s=middle),
        Span(kind="queue", task=task, start_s=middle, end_s=until_s),
    ]


def storage_of(events: Timed, lifetimes: Sequence[CheckpointLifetime]) -> StorageFacts | None:
    """Return what the checkpoints of a stage held, or None where it saved nothing."""
    if not lifetimes:
        return None
    sizes = [(time, event) for time, event in events if isinstance(event, CheckpointEvent)]
    return StorageFacts(
        held=tuple((time, event.held_bytes) for time, event in sizes if event.held_bytes is not None),
        allowed=tuple((time, event.budget_bytes) for time, event in sizes if event.budget_bytes),
        lifetimes=tuple(lifetimes),
        events=events,
    )


def rows_per_s(events: Timed) -> float | None:
    """Return the rows that the tasks of a stage predicted in a second of work.

    The time of an attempt is that between its first and last event, loading the model included; that of a task is the
    sum of its attempts.
    """
    rows = 0
    attempts: dict[tuple[int, int], list[float]] = {}
    for time, event in events:
        if event.role != "client":
            attempts.setdefault((event.task, event.number), []).append(time)
        if isinstance(event, UnitCommitted):
            rows += event.num_rows
    tasks: dict[int, float] = {}
    for (task, _), times in attempts.items():
        tasks[task] = tasks.get(task, 0.0) + max(times) - min(times)
    seconds = max(tasks.values(), default=0.0)
    return rows / seconds if rows and seconds > 0 else None


def peak_bytes(stages: Iterable[StageFacts]) -> tuple[float, float] | None:
    """Return the most bytes that checkpoints held, and the least budget they had.

    None where nothing was saved.
    """
    storages = [stage.storage for stage in stages if stage.storage is not None]
    held = [value for one in storages for _, value in one.held]
    allowed = [value for one in storages for _, value in one.allowed]
    return (max(held), min(allowed, default=math.inf)) if held else None


def stalls_of(stages: Iterable[StageFacts]) -> float:
    """Return the seconds that training stood still for its saves."""
    return sum(
        getattr(event, "stall_s", None) or 0.0
        for stage in stages
        if stage.storage is not None
        for _, event in stage.storage.events
    )


def _longest(spans: Iterable[Span]) -> float:
    tasks: dict[int, float] = {}
    for span in spans:
        tasks[span.task] = tasks.get(span.task, 0.0) + span.end_s - span.start_s
    return max(tasks.values(), default=0.0)
