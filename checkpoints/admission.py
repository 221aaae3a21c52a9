"""Whether the next checkpoint is saved in full, as weights only, or not at all: the ladder, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .commit import Checkpoint
from .retention import Policy, Verdict, make_room

Rung = Literal["full", "weights", "none"]
RUNGS: tuple[Rung, ...] = ("full", "weights")


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a save takes: of a full state, of its weights, and of what the run writes after training."""

    full_bytes: int
    weights_bytes: int
    later_bytes: int = 0
    is_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What is saved, and what is done first to make room for it."""

    rung: Rung
    verdicts: tuple[Verdict, ...]


def admit(
    checkpoints: Sequence[Checkpoint], policy: Policy, need: Need, *, free_bytes: int, highest: Rung = "full"
) -> Admission:
    """Return the highest rung that fits into *free_bytes* and what can be freed, not above *highest*.

    A full state is not admitted where it would leave no room for the weights at the end, which is
    what the run is for: it can only go once a newer full one is committed.
    """

    def clearing(num_bytes: int) -> tuple[Verdict, ...] | None:
        found = make_room(
            checkpoints, policy, need_bytes=num_bytes, free_bytes=free_bytes, weights_bytes=need.weights_bytes
        )
        return found.verdicts if found.is_enough else None

    if highest == "full" and _leaves_room(checkpoints, policy, need, free_bytes):
        verdicts = clearing(need.full_bytes)
        if verdicts is not None:
            return Admission(rung="full", verdicts=verdicts)
    if highest != "none":
        verdicts = clearing(need.weights_bytes + (0 if need.is_last else need.later_bytes))
        if verdicts is not None:
            return Admission(rung="weights", verdicts=verdicts)
    return Admission(rung="none", verdicts=())


def _leaves_room(checkpoints: Sequence[Checkpoint], policy: Policy, need: Need, free_bytes: int) -> bool:
    """Say whether the final weights and what follows fit beside a full state and the best one's weights."""
    mine = [one for one in checkpoints if one.status == "committed"]
    capacity = free_bytes + sum(one.num_bytes for one in mine if not one.is_pinned)
    best = need.weights_bytes if policy.keep_best else 0
    final = 0 if need.is_last else need.weights_bytes
    return need.full_bytes + best + final + need.later_bytes <= capacity
