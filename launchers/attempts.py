"""Decide what a stage's task does next from its earlier attempts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import EXIT_DEVICE_MEMORY, EXIT_DIVERGED, EXIT_NO_ROOM, EXIT_STOPPED
from ..events import Ended, Event, Saved, Started, UnitCommitted, UnitsLost, of
from ..recipes.fallbacks import smaller
from ..recipes.plan import Batch, Stage
from ..recipes.schema import StageSettings

MAX_IDLE = 3  # starts in a row that commit nothing before a job gives up its place in the queue


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a stage's task.

    *exit_code* is None while it runs or when it was killed.

    *progress* counts what it committed: checkpoints, units. *job* is the launcher's job that started it.
    """

    number: int
    batch: Batch | None = None
    exit_code: int | None = None
    progress: int = 0
    job: str = ""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """No further attempt, and the exit code that says why."""

    exit_code: int
    reason: str


def read_attempts(events: Sequence[Event], stage: str, task: int, batch: Batch | None) -> list[Attempt]:
    """Return the attempts of a stage's task in order, from the run's ledger.

    One whose units were lost since has no exit code, as one that was killed.
    """
    found: dict[int, Attempt] = {}
    mine = [event for event in events if event.stage == stage and event.task == task and event.role != "client"]
    lost = {event.number for event in of(mine, UnitsLost)}
    for event in mine:
        known = found.get(event.number, Attempt(number=event.number, batch=batch))
        if isinstance(event, Started):
            known = replace(known, batch=_batch_of(event, batch), job=event.job or "")
        elif isinstance(event, UnitCommitted) or (isinstance(event, Saved) and event.content != "weights"):
            # no training resumes from weights alone: saving them again and again is no progress
            known = replace(known, progress=known.progress + 1)
        elif isinstance(event, Ended):
            known = replace(known, exit_code=None if event.number in lost else event.exit_code)
        found[event.number] = known
    return [found[number] for number in sorted(found)]


def _batch_of(start: Started, batch: Batch | None) -> Batch | None:
    """Return *batch* with the sizes that an attempt started with."""
    if batch is None or start.micro_batch is None or start.accumulation is None:
        return batch
    fallbacks = tuple(start.fallbacks.split(",")) if start.fallbacks else ()
    return replace(batch, micro_batch=start.micro_batch, accumulation=start.accumulation, fallbacks=fallbacks)


def first_batch(attempts: Sequence[Attempt], stage: Stage) -> Batch | None:
    """Return the batch of a newly started job.

    It is that of the last attempt, or a smaller one if that ran out of device memory.
    """
    if not attempts or attempts[-1].batch is None:
        return stage.batch
    last = attempts[-1].batch
    return smaller(last, stage.settings) or last if attempts[-1].exit_code == EXIT_DEVICE_MEMORY else last


def is_idle(attempts: Sequence[Attempt]) -> bool:
    """Return whether the last starts committed nothing, as another would not."""
    tail = attempts[-MAX_IDLE:]
    return len(tail) == MAX_IDLE and not any(attempt.progress for attempt in tail)


def next_batch(attempt: Attempt, settings: StageSettings) -> Batch | None | Stop:
    """Return the batch of the attempt that follows *attempt*, or why there is none.

    A crash is tried again only after progress, so that a crash loop ends by itself.
    """
    code = attempt.exit_code
    if code == 0:
        return Stop(exit_code=0, reason="done")
    if code == EXIT_STOPPED:
        return Stop(exit_code=code, reason="saved and stopped")
    if code == EXIT_NO_ROOM:
        return Stop(
            exit_code=code, reason="no space left on the disk; what was committed is safe: free some and resume"
        )
    if code == EXIT_DEVICE_MEMORY:
        following = smaller(attempt.batch, settings) if attempt.batch else None
        return following or Stop(exit_code=code, reason=_out_of_memory(attempt.batch))
    if code == EXIT_DIVERGED:
        return Stop(exit_code=code, reason="the training diverged")  # it said itself what is kept
    if attempt.progress == 0:
        return Stop(exit_code=code or 1, reason=f"exit code {code} without progress")
    return attempt.batch


def _out_of_memory(batch: Batch | None) -> str:
    if batch is None:
        return "out of device memory"
    given_up = f" and {', '.join(batch.fallbacks)}" if batch.fallbacks else ""
    return f"out of device memory with a micro batch of {batch.micro_batch}{given_up}"
