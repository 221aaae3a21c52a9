"""Answer questions about the events of a run, for all who read them. Pure.

Events come as `ledger.read` returns them: by number, writer and sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .events import (
    CancelAsked,
    Ended,
    Error,
    Event,
    Finished,
    Intent,
    Kept,
    ModelWritten,
    Retention,
    Saved,
    Sent,
    Started,
    Step,
    Stripped,
    UnitsLost,
    of,
)


def by_stage(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Return the events of each stage."""
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event.stage, []).append(event)
    return found


def done_tasks(events: Iterable[Event], stage: str) -> set[int]:
    """Return the tasks of *stage* of which an attempt ended with exit code 0.

    One whose units were lost since does not count.
    """
    mine = [event for event in events if event.stage == stage]
    lost = {(event.task, event.number) for event in of(mine, UnitsLost)}
    return {event.task for event in of(mine, Ended) if event.exit_code == 0 and (event.task, event.number) not in lost}


def done_stages(events: Iterable[Event]) -> set[str]:
    """Return the stages of which a task ended with exit code 0."""
    return {event.stage for event in of(events, Ended) if event.exit_code == 0}


def last_sent(events: Iterable[Event]) -> dict[str, Sent]:
    """Return the record of the job that was sent last for each stage."""
    found: dict[str, Sent] = {}
    for event in of(events, Sent):
        if event.stage not in found or event.submission >= found[event.stage].submission:
            found[event.stage] = event
    return found


def unsettled(events: Iterable[Event]) -> dict[str, Intent]:
    """Return the intents, by key, whose outcome nobody recorded.

    A job of theirs may or may not be there.
    """
    events = list(events)
    settled = {stage: sent.submission for stage, sent in last_sent(events).items()}
    return {event.key: event for event in of(events, Intent) if event.number > settled.get(event.stage, 0)}


def is_cancelled(events: Sequence[Event], stage: str) -> bool:
    """Return whether a person asked the newest job of *stage* to end."""
    sent = [event.number for event in of(events, Sent) if event.stage == stage]
    asked = [event.number for event in of(events, CancelAsked) if event.stage == stage]
    return bool(asked) and max(asked) > max(sent, default=0)


def jobs_started(events: Iterable[Event], stage: str) -> list[str]:
    """Return the launcher's jobs that started attempts of *stage*.

    For an element of an array it is the whole job.
    """
    return [(event.job or "").partition("_")[0] for event in of(events, Started) if event.stage == stage]


def newest_attempt(events: Iterable[Event], stage: str, task: int) -> int:
    """Return the number of the newest attempt of a task, or 0."""
    mine = (event.number for event in events if (event.role, event.stage, event.task) == ("stage", stage, task))
    return max(mine, default=0)


def endings(events: Sequence[Event]) -> dict[tuple[str, int, int], tuple[int, str] | None]:
    """Return exit code and error of each attempt, by stage, task and number.

    None stands for the newest of a task that has no end yet: it runs, or its job was lost.
    """
    found: dict[tuple[str, int, int], tuple[int, str] | None] = {}
    errors: dict[tuple[str, int, int], str] = {}
    for event in events:
        place = (event.stage, event.task, event.number)
        if isinstance(event, Started):
            for stage, task, number in found:
                if (stage, task) == place[:2] and found[stage, task, number] is None:
                    found[stage, task, number] = (1, "it was killed")
            found.setdefault(place, None)
        elif isinstance(event, Error):
            errors[place] = event.message
        elif isinstance(event, Ended):
            found[place] = (event.exit_code, errors.get(place, ""))
    return found


def rank_codes(events: Iterable[Event], stage: str, task: int, attempt: int) -> list[int]:
    """Return the exit codes that the ranks of an attempt recorded.

    srun and torchrun return only one of them.
    """
    errors = (event for event in of(events, Error) if (event.stage, event.task, event.number) == (stage, task, attempt))
    return [event.exit_code for event in errors if event.exit_code is not None]


def is_finished(events: Iterable[Event], stage: str, task: int, attempt: int) -> bool:
    """Return whether rank 0 of an attempt came to its end."""
    return any((event.stage, event.task, event.number) == (stage, task, attempt) for event in of(events, Finished))


def last_step(events: Iterable[Event]) -> int:
    """Return the optimizer step that training reported or saved last, or 0."""
    steps = [event.step for event in events if isinstance(event, Step | Saved)]
    return steps[-1] if steps else 0


def has_model(events: Iterable[Event], stage: str, digest: str | None) -> bool:
    """Return whether *stage* recorded that it wrote the model with this digest."""
    return any((event.stage, event.digest) == (stage, digest) for event in of(events, ModelWritten))


@dataclass(frozen=True, kw_only=True)
class CheckpointLifetime:
    """A checkpoint from its save to its end, in seconds from the first event.

    *end_s* is None while it is there.

    *stripped_s* is when only its weights were left. *num_bytes* is what it held first, *left_bytes* last; *why* is the
    reason of its end. *fate* is the kind of the event that ended it.
    """

    stage: str
    step: int
    attempt: int
    born_s: float
    num_bytes: int
    left_bytes: int
    fate: str = Kept.kind
    stripped_s: float | None = None
    end_s: float | None = None
    why: str = ""


def timed(events: Iterable[Event]) -> list[tuple[float, Event]]:
    """Return *events* with seconds from the first one.

    They never fall from one event of a writer to the next.
    """
    found: list[tuple[float, Event]] = []
    first = math.inf
    latest: dict[tuple[str, str, int], float] = {}
    for event in events:
        writer = (event.role, event.stage, event.task)
        latest[writer] = max(latest.get(writer, -math.inf), event.time)
        first = min(first, latest[writer])
        found.append((latest[writer], event))
    return [(time - first, event) for time, event in found]


def checkpoint_lifetimes(events: Sequence[tuple[float, Event]]) -> list[CheckpointLifetime]:
    """Return the lifetime of every saved checkpoint, from `timed` events."""
    found: dict[tuple[str, int], CheckpointLifetime] = {}
    # What a person pruned comes last: a client's number says nothing of the attempts that it came after.
    for time, event in sorted(events, key=lambda each: each[1].role == "client"):
        if isinstance(event, Saved):
            num_bytes = event.num_bytes or 0
            found[event.stage, event.step] = CheckpointLifetime(
                stage=event.stage,
                step=event.step,
                attempt=event.number,
                born_s=time,
                num_bytes=num_bytes,
                left_bytes=num_bytes,
            )
        elif isinstance(event, Retention) and (known := found.get((event.stage, event.step))) is not None:
            if event.attempt in (None, known.attempt):  # else another attempt has saved this step again
                found[event.stage, event.step] = _after(known, time, event)
    return list(found.values())


def _after(known: CheckpointLifetime, time: float, event: Retention) -> CheckpointLifetime:
    """Return the lifetime of a checkpoint after *event*."""
    if isinstance(event, Kept) or (known.end_s is not None and not isinstance(event, Stripped)):
        return known
    why = event.reason or ""
    if isinstance(event, Stripped):
        return replace(known, fate=event.kind, stripped_s=time, left_bytes=event.left_bytes or 0, why=why)
    return replace(known, fate=event.kind, end_s=time, why=why)
