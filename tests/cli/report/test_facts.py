"""How the time of a stage was spent, from its events."""

from __future__ import annotations

import pytest

from sousbatch.cli.report.facts import StageFacts, rows_per_s, spans_of
from sousbatch.events import Ended, Event, Sent, Started, Step, UnitCommitted

Row = tuple[str, float, float]


def sent(time: float) -> tuple[float, Event]:
    return time, Sent(role="client", stage="train", key="k", launcher="local", job_id="j")


def attempt(number: int, start: float, end: float, code: int | None, *, task: int = 0) -> list[tuple[float, Event]]:
    place = {"stage": "train", "task": task, "number": number}
    found: list[tuple[float, Event]] = [(start, Started(role="stage", host="node-3", **place))]
    if code is None:
        return [*found, (end, Step(role="job", step=1, values={"loss": 1.0}, **place))]
    return [*found, (end, Ended(role="stage", exit_code=code, **place))]


@pytest.mark.parametrize(
    ("events", "word", "expected"),
    [
        ([sent(0), *attempt(1, 20, 50, 0)], "done", [("behind", 0, 8), ("queue", 8, 20), ("done", 20, 50)]),
        ([sent(9), *attempt(1, 20, 50, 1)], "failed", [("queue", 9, 20), ("failed", 20, 50)]),
        (
            [sent(9), *attempt(1, 20, 50, 75), *attempt(2, 70, 90, 0)],
            "done",
            [("queue", 9, 20), ("stopped", 20, 50), ("requeue", 50, 70), ("done", 70, 90)],
        ),
        (
            [sent(9), *attempt(1, 20, 50, None), sent(60), *attempt(2, 70, 90, None)],
            "running",
            [("queue", 9, 20), ("killed", 20, 50), ("queue", 60, 70), ("running", 70, 100)],
        ),
        ([sent(9)], "waiting", [("queue", 9, 100)]),
        ([sent(9), *attempt(1, 20, 50, 75)], "waiting", [("queue", 9, 20), ("stopped", 20, 50), ("requeue", 50, 100)]),
        ([sent(9)], "cancelled", []),
        ([], "lost", []),
        (attempt(1, 20, 50, 0), "done", [("done", 20, 50)]),
    ],
)
def test_a_stage_waits_for_others_then_for_devices_then_runs(
    events: list[tuple[float, Event]], word: str, expected: list[Row]
) -> None:
    found = spans_of(events, ready_s=8, end_s=100, word=word)
    assert [(span.kind, span.start_s, span.end_s) for span in found] == expected


def test_each_task_of_an_array_has_its_own_time() -> None:
    events = [sent(0), *attempt(1, 10, 30, 0, task=0), *attempt(1, 20, 25, 0, task=3)]
    spans = spans_of(events, ready_s=0, end_s=30, word="done")
    stage = StageFacts(name="predict", spans=spans)
    assert [(span.task, span.kind) for span in spans] == [(0, "queue"), (0, "done"), (3, "queue"), (3, "done")]
    assert (stage.waited_s, stage.ran_s) == (20, 20)


def test_rows_a_second_are_those_of_all_tasks_over_the_longest() -> None:
    events: list[tuple[float, Event]] = []
    for task in (0, 1):
        events += [(0.0, Started(role="stage", task=task, number=1))]
        events += [(time, UnitCommitted(role="job", task=task, number=1, unit=task, num_rows=64)) for time in (5, 10)]
    assert rows_per_s(events) == pytest.approx(25.6)
    again = [(50.0, UnitCommitted(role="job", task=0, number=2, unit=2, num_rows=64))]
    again += [(60.0, UnitCommitted(role="job", task=0, number=2, unit=3, num_rows=64))]
    assert rows_per_s([*events, *again]) == pytest.approx(384 / 20), "both attempts took time"
    assert rows_per_s(events[:1]) is None
