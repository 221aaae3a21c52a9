"""Which checkpoints stay, as tables of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention.decisions import decide, make_room
from sousbatch.checkpoints.retention.policies import standard_rules

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
    decisions = decide(checkpoints, standard_rules(**policy))
    assert [decision.checkpoint for decision in decisions] == list(checkpoints)
    assert all(decision.reason for decision in decisions)
    return [decision.checkpoint.step for decision in decisions if decision.action == "keep"]


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


def test_the_order_is_by_attempt_and_step_not_by_the_order_given() -> None:
    shuffled = [made()[place] for place in (3, 0, 4, 2, 1)]
    assert kept(shuffled, keep_last=2, keep_best=0) == [40, 50]
    went_back = replace(made()[1], step=25, attempt=2)
    assert kept([*made(), went_back], keep_last=1, keep_best=0) == [25]


def test_third_party_and_incomplete_ones_are_never_removed_and_count_for_nothing() -> None:
    other = Checkpoint(path=Path("checkpoint-5"), step=5, status="third-party")
    incomplete = Checkpoint(path=Path(".tmp-step-60"), step=60, status="incomplete")
    assert kept([other, *made(), incomplete], keep_last=1, keep_best=0) == [5, 50, 60]


def test_nothing_gives_nothing() -> None:
    assert kept([], keep_last=1) == []


FULL, WEIGHTS = 100, 20


def sized(*steps: int, best: int | None = None, pinned: Sequence[int] = (), weights: Sequence[int] = ()) -> list[Any]:
    """Checkpoints of 100 bytes, or 20 where only the weights are left."""
    return [
        replace(
            one,
            num_bytes=WEIGHTS if one.step in weights else FULL,
            content="weights" if one.step in weights else "full",
        )
        for one in made(steps, [0.1 if step == best else 0.5 for step in steps], pinned)
    ]


def cleared(checkpoints: Sequence[Checkpoint], free: int, need: int = FULL, **policy: Any) -> list[tuple[str, int]]:
    found = make_room(checkpoints, standard_rules(**policy), need_bytes=need, free_bytes=free, weights_bytes=WEIGHTS)
    left = free
    for decision in found.decisions:
        assert decision.action != "strip" or left >= WEIGHTS, "no space for the stripped copy"
        left += decision.frees_bytes
    assert found.is_enough == (left >= need)
    return [(decision.action, decision.checkpoint.step) for decision in found.decisions] + [("short", 0)] * (
        left < need
    )


EVERY = {"keep_every_steps": 10, "keep_last": 1, "keep_best": 1}
CLEARINGS: dict[str, tuple[list[Any], int, dict[str, Any], list[tuple[str, int]]]] = {
    "all that the policies let go, also where less would do": (
        sized(10, 20, 30),
        99,
        {},
        [("delete", 10), ("delete", 20)],
    ),
    "and nothing of it where there is room": (sized(10, 20, 30), 100, {}, []),
    "nothing where there is room": (sized(10, 20, best=10), 100, {}, []),
    "the best is stripped": (sized(10, 20, best=10), 20, {}, [("strip", 10)]),
    "the best is stripped only where its copy has space": (sized(10, 20, best=10), 19, {}, [("short", 0)]),
    "the best never goes": (sized(10, 20, best=10, weights=[10]), 90, {}, [("short", 0)]),
    "the newest is never touched, though it is not the best": (sized(20), 99, {}, [("short", 0)]),
    "the pinned is never touched": (sized(10, 20, pinned=[10]), 20, {}, [("short", 0)]),
    "thinning comes before going, the oldest first": (sized(10, 20, 30, 40, best=40), 20, EVERY, [("strip", 10)]),
    "as few go as can": (sized(10, 20, 30, 40, best=40, weights=[20, 30]), 0, EVERY, [("delete", 10)]),
    "the best is stripped last": (sized(10, 20, 30, best=10), 30, EVERY | {"keep_last": 2}, [("strip", 20)]),
    "older last ones go before the best is touched": (
        sized(10, 20, 30, best=10, weights=[10]),
        0,
        {"keep_last": 2},
        [("delete", 20)],
    ),
    "what goes is archived where there is an archive": (
        sized(10, 20),
        0,
        {"keep_best": 0, "archives": True},
        [("archive", 10)],
    ),
    "of no full state the newest weights stay": (sized(10, 20, best=10, weights=[10, 20]), 70, {}, [("short", 0)]),
    "weights do not stand in for the newest full state": (
        sized(10, 20, 30, best=30, weights=[20, 30]),
        70,
        {},
        [("delete", 20), ("short", 0)],
    ),
}


@pytest.mark.parametrize(("checkpoints", "free", "policy", "expected"), CLEARINGS.values(), ids=CLEARINGS)
def test_room_is_made_least_valuable_first(
    checkpoints: list[Any], free: int, policy: dict[str, Any], expected: list[tuple[str, int]]
) -> None:
    assert cleared(checkpoints, free, **policy) == expected


def test_a_policy_of_thinning_leaves_the_last_and_the_pinned_whole() -> None:
    found = decide(
        sized(10, 20, 30, 40, best=20, pinned=[30]),
        standard_rules(strips=True, keep_every_steps=10),
        weights_bytes=WEIGHTS,
    )
    assert [(one.action, one.frees_bytes) for one in found] == [("strip", 80), ("strip", 80), ("keep", 0), ("keep", 0)]


def test_weights_whose_full_state_is_still_there_go_first() -> None:
    """A kill between the commit of the stripped one and the removal of the full one leaves both."""
    full, newest = sized(10, 20, best=10)
    spare = replace(full, path=Path("step-00000010-weights"), content="weights", num_bytes=WEIGHTS)
    decisions = decide([full, spare, newest], standard_rules())
    assert [(one.action, one.frees_bytes) for one in decisions] == [("keep", 0), ("delete", WEIGHTS), ("keep", 0)]
