"""Which checkpoints stay, as tables of steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention import Policy, decide

STEPS = (10, 20, 30, 40, 50)
METRICS = (0.9, 0.3, 0.5, 0.2, 0.4)


def made(
    steps: Sequence[int] = STEPS, metrics: Sequence[float | None] | None = None, pinned: Sequence[int] = ()
) -> list[Checkpoint]:
    return [
        Checkpoint(path=Path(f"step-{step:08d}"), step=step, metric=metric, is_pinned=step in pinned)
        for step, metric in zip(steps, metrics or [None] * len(steps), strict=True)
    ]


def kept(checkpoints: Sequence[Checkpoint], **policy: Any) -> list[int]:
    verdicts = decide(checkpoints, Policy(**policy))
    assert [verdict.checkpoint for verdict in verdicts] == list(checkpoints)
    assert all(verdict.reason for verdict in verdicts)
    return [verdict.checkpoint.step for verdict in verdicts if verdict.action == "keep"]


@pytest.mark.parametrize("keep_last, expected", [(1, [50]), (2, [40, 50]), (5, list(STEPS)), (15, list(STEPS))])
def test_the_last_stay(keep_last: int, expected: list[int]) -> None:
    assert kept(made(), keep_last=keep_last, keep_best=0) == expected


@pytest.mark.parametrize("keep_last", [0, -3])
def test_the_newest_stays_whatever_the_policy_says(keep_last: int) -> None:
    assert kept(made(), keep_last=keep_last, keep_best=0) == [50]


@pytest.mark.parametrize(
    "goal, keep_best, expected",
    [
        ("lowest", 0, [50]),
        ("lowest", 1, [40, 50]),
        ("lowest", 2, [20, 40, 50]),
        ("highest", 1, [10, 50]),
        ("highest", 2, [10, 30, 50]),
        ("highest", 9, list(STEPS)),
    ],
)
def test_the_best_by_the_metric_stay(goal: str, keep_best: int, expected: list[int]) -> None:
    assert kept(made(metrics=METRICS), keep_best=keep_best, goal=goal) == expected


def test_of_equals_the_newer_is_the_better() -> None:
    assert kept(made(metrics=[0.5] * 5), keep_best=2) == [40, 50]


def test_what_was_not_measured_is_never_the_best() -> None:
    assert kept(made(metrics=[None, 0.5, None, None, None]), keep_best=2) == [20, 50]
    assert kept(made(metrics=[None, 0.0, 0.1, None, None]), keep_best=1, goal="lowest") == [20, 50]


@pytest.mark.parametrize("every, expected", [(20, [20, 40, 50]), (10, list(STEPS)), (7, [50]), (None, [50])])
def test_multiples_stay_for_good(every: int | None, expected: list[int]) -> None:
    assert kept(made(), keep_best=0, keep_every_steps=every) == expected


def test_the_pinned_stay() -> None:
    assert kept(made(pinned=[20]), keep_best=0) == [20, 50]


def test_rules_add_up() -> None:
    found = kept(made(metrics=METRICS, pinned=[10]), keep_last=1, keep_best=1, keep_every_steps=30)
    assert found == [10, 30, 40, 50]


def test_the_order_is_by_step_and_attempt_not_by_the_order_given() -> None:
    shuffled = [made()[place] for place in (3, 0, 4, 2, 1)]
    assert kept(shuffled, keep_last=2, keep_best=0) == [40, 50]


def test_foreign_and_torn_ones_are_never_removed_and_count_for_nothing() -> None:
    foreign = Checkpoint(path=Path("checkpoint-5"), step=5, status="foreign")
    torn = Checkpoint(path=Path(".tmp-step-60"), step=60, status="torn")
    assert kept([foreign, *made(), torn], keep_last=1, keep_best=0) == [5, 50, 60]


def test_nothing_gives_nothing() -> None:
    assert kept([], keep_last=1) == []
