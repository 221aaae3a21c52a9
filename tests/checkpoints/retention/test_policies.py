"""The contract that every retention policy passes, and what several say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention.decisions import decide, make_room
from sousbatch.checkpoints.retention.policies import (
    AnyOf,
    KeepBest,
    KeepEverySteps,
    KeepLast,
    KeepSteps,
    Kept,
    Pinned,
    RetentionPolicy,
    RetentionRules,
)

FULL, WEIGHTS = 100, 20


@dataclass(frozen=True)
class KeepFirst:
    """A third-party policy: no class of ours, and nothing but what the protocol names."""

    num_protected: int = 1

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        kept = Kept(reason="where it began", value=(9,), at_most="strip")
        return {0: kept} if checkpoints else {}


POLICIES: dict[str, RetentionPolicy] = {
    "last": KeepLast(2),
    "last 0": KeepLast(0),
    "best": KeepBest(2),
    "best by the highest": KeepBest(3, "highest"),
    "best 0": KeepBest(0),
    "every": KeepEverySteps(3),
    "steps": KeepSteps((2, 7)),
    "pinned": Pinned(),
    "third-party": KeepFirst(),
    "any": AnyOf((Pinned(), KeepLast(1), KeepBest(2), KeepEverySteps(4), KeepFirst())),
    "any of none": AnyOf(()),
}


def made(count: int, **more: Any) -> list[Checkpoint]:
    """Return checkpoints of a training, oldest first: some pinned, some not measured, some with weights only."""
    return [
        Checkpoint(
            path=Path(f"step-{step}"),
            step=step,
            metric=None if step % 5 == 4 else float(step * 7 % 11),
            is_pinned=step % 6 == 2,
            content="weights" if step % 4 == 1 else "full",
            num_bytes=WEIGHTS if step % 4 == 1 else FULL,
        )
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
class TestContract:
    def test_it_selects_places_of_the_list_and_gives_reasons(self, policy: RetentionPolicy) -> None:
        for count in (0, 1, 2, 12):
            found = policy.select(made(count))
            assert set(found) <= set(range(count))
            assert all(kept.reason for kept in found.values())

    def test_it_changes_nothing_and_answers_the_same_twice(self, policy: RetentionPolicy) -> None:
        checkpoints = made(12)
        assert policy.select(checkpoints) == policy.select(checkpoints) and checkpoints == made(12)
        assert policy == replace(policy) and hash(policy) == hash(replace(policy))  # type: ignore[type-var]

    def test_it_protects_no_more_than_it_says(self, policy: RetentionPolicy) -> None:
        plain = [replace(one, is_pinned=False) for one in made(12)]
        assert sum(kept.at_most != "delete" for kept in policy.select(plain).values()) <= policy.num_protected

    def test_what_it_keeps_stays_and_the_newest_does_under_every_policy(self, policy: RetentionPolicy) -> None:
        checkpoints = made(12)
        actions = [one.action for one in decide(checkpoints, RetentionRules(policy=policy))]
        kept = {*policy.select(checkpoints), 11}
        assert [place for place, action in enumerate(actions) if action == "keep"] == sorted(kept)

    def test_no_space_is_worth_the_newest_or_what_may_not_go(self, policy: RetentionPolicy) -> None:
        checkpoints, rules = made(12), RetentionRules(policy=policy)
        kept = policy.select(checkpoints)
        for need in range(0, 12 * FULL, 10):
            found = make_room(checkpoints, rules, need_bytes=need, free_bytes=WEIGHTS, weights_bytes=WEIGHTS)
            for decision in found.decisions:
                place = checkpoints.index(decision.checkpoint)
                at_most = kept[place].at_most if place in kept else "delete"
                assert place != 11 and at_most != "keep"
                assert decision.action == "strip" or at_most == "delete"


def test_several_give_the_first_reason_and_the_strictest_rest() -> None:
    checkpoints = [replace(one, is_pinned=False) for one in made(4)]
    both = AnyOf((KeepLast(4), KeepBest(1)))
    best = min(
        (place for place in range(4) if checkpoints[place].metric is not None),
        key=lambda place: checkpoints[place].metric,
    )  # type: ignore[arg-type, return-value]
    assert both.select(checkpoints)[best] == Kept(reason="among the last", value=(2, 0), in_full=True, at_most="strip")


def test_a_third_party_policy_takes_part_in_making_space() -> None:
    """Its value is the highest here, so that what others keep goes first; what it protects is stripped at last."""
    checkpoints = [replace(one, is_pinned=False, content="full", num_bytes=FULL) for one in made(4)]
    rules = RetentionRules(policy=AnyOf((KeepEverySteps(1), KeepFirst())))
    order = [
        [(one.action, one.checkpoint.step) for one in found.decisions]
        for need in (80, 160, 260, 280)
        if (found := make_room(checkpoints, rules, need_bytes=need, free_bytes=WEIGHTS, weights_bytes=WEIGHTS))
    ]
    assert order == [
        [("strip", 2)],
        [("strip", 2), ("strip", 3)],
        [("strip", 2), ("strip", 3), ("strip", 1)],
        [("delete", 2), ("strip", 3), ("strip", 1)],
    ]
