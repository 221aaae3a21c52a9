"""Whether the next checkpoint is saved in full, as weights only, or not at all: the ladder, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..commit import Checkpoint
from .decisions import Policy, Verdict, make_room

Rung = Literal["full", "weights", "none"]
RUNGS: tuple[Rung, ...] = ("full", "weights")


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a save takes: of a full state, of its weights, and of what the run writes after training.

    *is_stop*: the training stops here and goes on later, from this one. *has_reserve*: room for the weights at the end
    is held already.
    """

    full_bytes: int
    weights_bytes: int
    later_bytes: int = 0
    is_last: bool = False
    is_stop: bool = False
    has_reserve: bool = False

    @property
    def final_bytes(self) -> int:
        """What must stay free for the end: the weights, unless they have their reserve, and what is written later."""
        return self.later_bytes + (0 if self.has_reserve else self.weights_bytes)

    def bytes_of(self, rung: Rung) -> int:
        return {"full": self.full_bytes, "weights": self.weights_bytes, "none": 0}[rung]


@dataclass(frozen=True, kw_only=True)
class _Rungs:
    """What each rung takes in the long run: a new full state beside the last one, one full state that stays and new
    weights beside the last ones, weights alone; each beside the weights of the best one."""

    full: int
    one_full: int
    weights: int


def _rungs(need: Need, policy: Policy) -> _Rungs:
    best = need.weights_bytes if policy.keep_best else 0
    weights = 2 * need.weights_bytes + best
    return _Rungs(full=2 * need.full_bytes + best, one_full=need.full_bytes + weights, weights=weights)


def holds_reserve(need: Need, policy: Policy, *, capacity_bytes: int, reserve_bytes: int) -> bool:
    """Say whether *capacity_bytes* can do without a reserve for the weights at the end, and fall to no lower rung."""
    rungs = _rungs(need, policy)

    def height(num_bytes: int) -> int:
        return sum(num_bytes >= rung for rung in (rungs.full, rungs.one_full, rungs.weights))

    capacity = capacity_bytes - need.later_bytes
    return capacity >= reserve_bytes and height(capacity) == height(capacity - reserve_bytes)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What is saved, and what is done first to make room for it."""

    rung: Rung
    verdicts: tuple[Verdict, ...]


def admit(
    checkpoints: Sequence[Checkpoint], policy: Policy, need: Need, *, free_bytes: int, highest: Rung = "full"
) -> Admission:
    """Return the highest rung that fits into *free_bytes* and what can be freed, not above *highest*.

    Nothing is admitted that would leave no room for the weights at the end, which are what the run is for: not a
    full state that can only go once a newer one is committed, not weights that must stay until then, and not what
    would take the room in which an older one could still be thinned.
    """
    for rung in RUNGS[RUNGS.index(highest) :] if highest != "none" else ():
        verdicts = _clearing(checkpoints, policy, need, rung, free_bytes)
        if verdicts is not None:
            return Admission(rung=rung, verdicts=verdicts)
    return Admission(rung="none", verdicts=())


def _clearing(
    checkpoints: Sequence[Checkpoint], policy: Policy, need: Need, rung: Rung, free_bytes: int
) -> tuple[Verdict, ...] | None:
    """Return what is done before saving *rung*, None where it does not fit: no more than is needed if that will do."""
    wanted, left = need.bytes_of(rung), _left_by(checkpoints, policy, need, rung, free_bytes)
    for more in sorted({0, left}):
        found = make_room(
            checkpoints, policy, need_bytes=wanted + more, free_bytes=free_bytes, weights_bytes=need.weights_bytes
        )
        if not found.is_enough:
            continue
        after = [*_after(checkpoints, found.verdicts, need), _next(checkpoints, rung, wanted)]
        free = free_bytes + sum(verdict.frees_bytes for verdict in found.verdicts) - wanted
        if make_room(after, policy, need_bytes=left, free_bytes=free, weights_bytes=need.weights_bytes).is_enough:
            return found.verdicts
    return None


def _left_by(checkpoints: Sequence[Checkpoint], policy: Policy, need: Need, rung: Rung, free_bytes: int) -> int:
    """Return what must be free, or free to be made, once *rung* is saved: the weights at the end come first.

    A full state that no newer one will ever replace also leaves room for weights now and then: soon it is too old to
    be worth more than they are. But where training stops, nothing is worth more than a full state.
    """
    if need.is_last:
        return need.later_bytes if rung == "full" else 0
    capacity = free_bytes + sum(one.num_bytes for one in checkpoints if one.status == "committed" and not one.is_pinned)
    rungs = _rungs(need, policy)
    if rung == "full" and not need.is_stop and capacity - need.later_bytes < rungs.full:
        return need.later_bytes + rungs.weights
    return need.final_bytes


def _after(checkpoints: Sequence[Checkpoint], verdicts: Sequence[Verdict], need: Need) -> list[Checkpoint]:
    """Return what is there once *verdicts* are carried out."""
    actions = {id(verdict.checkpoint): verdict.action for verdict in verdicts}
    found = []
    for one in checkpoints:
        action = actions.get(id(one), "keep")
        if action == "thin":
            found.append(replace(one, content="weights", num_bytes=need.weights_bytes))
        elif action == "keep":
            found.append(one)
    return found


def _next(checkpoints: Sequence[Checkpoint], rung: Rung, num_bytes: int) -> Checkpoint:
    """Return the one that is about to be saved. Its metric is not known: that the best is an older one is worse."""
    newest = max((one.order for one in checkpoints if one.status == "committed"), default=(0, 0))
    content: Literal["full", "weights"] = "weights" if rung == "weights" else "full"
    return Checkpoint(path=Path("next"), step=newest[1] + 1, attempt=newest[0], content=content, num_bytes=num_bytes)
