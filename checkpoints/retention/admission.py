"""Decide how the next checkpoint is saved: a pure function.

It is saved in full, as weights only, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..commit import Checkpoint
from .decisions import RetentionDecision, make_room
from .policies import RetentionRules
from .save_level import SaveLevel, least_held, levels_from


@dataclass(frozen=True, kw_only=True)
class SaveRequirements:
    """The bytes that a save takes.

    They are those of a full state, of its weights, and of what the run writes after training. *is_stop*: the training
    stops here and resumes later, from this one. *has_reserve*: space for the weights at the end is held already.
    """

    full_bytes: int
    weights_bytes: int
    later_bytes: int = 0
    is_last: bool = False
    is_stop: bool = False
    has_reserve: bool = False

    @property
    def final_bytes(self) -> int:
        """The bytes that must stay free for the end.

        They are those of the weights, unless they have their reserve, and what is written later.
        """
        return self.later_bytes + (0 if self.has_reserve else self.weights_bytes)

    def bytes_of(self, level: SaveLevel) -> int:
        return {"full": self.full_bytes, "weights": self.weights_bytes, "none": 0}[level]


@dataclass(frozen=True, kw_only=True)
class _Thresholds:
    """The bytes of a training in the long run, beside the weights of the best one.

    A new full state beside the last one; one full state that stays, and new weights beside the last ones; weights
    alone.
    """

    full: int
    one_full: int
    weights: int


def _thresholds(need: SaveRequirements, rules: RetentionRules) -> _Thresholds:
    full, weights = (
        least_held(level, rules.policy.num_protected).bytes_of(need.full_bytes, need.weights_bytes)
        for level in levels_from("full")
    )
    return _Thresholds(full=full, one_full=need.full_bytes + weights, weights=weights)


def holds_reserve(need: SaveRequirements, rules: RetentionRules, *, capacity_bytes: int, reserve_bytes: int) -> bool:
    """Say whether a reserve for the final weights leaves the save level as it is."""
    thresholds = _thresholds(need, rules)

    def height(num_bytes: int) -> int:
        return sum(num_bytes >= least for least in (thresholds.full, thresholds.one_full, thresholds.weights))

    capacity = capacity_bytes - need.later_bytes
    return capacity >= reserve_bytes and height(capacity) == height(capacity - reserve_bytes)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """The level of a save, and the decisions that free space for it first."""

    level: SaveLevel
    decisions: tuple[RetentionDecision, ...]


def admit(
    checkpoints: Sequence[Checkpoint],
    rules: RetentionRules,
    need: SaveRequirements,
    *,
    free_bytes: int,
    highest: SaveLevel = "full",
) -> Admission:
    """Return the highest level that fits, not above *highest*.

    It must fit into *free_bytes* and what can be freed. Nothing is admitted that would leave no space for the weights
    at the end, which are what the run is for: not a full state that can only go once a newer one is committed, not
    weights that must stay until then, and not what would take the space in which an older one could still be stripped.
    """
    for level in levels_from(highest):
        decisions = _free_for(checkpoints, rules, need, level, free_bytes)
        if decisions is not None:
            return Admission(level=level, decisions=decisions)
    return Admission(level="none", decisions=())


def _free_for(
    checkpoints: Sequence[Checkpoint], rules: RetentionRules, need: SaveRequirements, level: SaveLevel, free_bytes: int
) -> tuple[RetentionDecision, ...] | None:
    """Return what is done before a save at *level*.

    It is no more than is needed, and None where the save does not fit.
    """
    wanted, left = need.bytes_of(level), _bytes_to_leave(checkpoints, rules, need, level, free_bytes)
    for more in sorted({0, left}):
        found = make_room(
            checkpoints, rules, need_bytes=wanted + more, free_bytes=free_bytes, weights_bytes=need.weights_bytes
        )
        if not found.is_enough:
            continue
        after = [*_apply(checkpoints, found.decisions, need), _predict_next(checkpoints, level, wanted)]
        free = free_bytes + sum(decision.frees_bytes for decision in found.decisions) - wanted
        if make_room(after, rules, need_bytes=left, free_bytes=free, weights_bytes=need.weights_bytes).is_enough:
            return found.decisions
    return None


def _bytes_to_leave(
    checkpoints: Sequence[Checkpoint], rules: RetentionRules, need: SaveRequirements, level: SaveLevel, free_bytes: int
) -> int:
    """Return what must be free, or can be freed, after a save at *level*.

    The weights at the end come first. A full state that no newer one will ever replace also leaves space for weights
    now and then: soon it is too old to be worth more than they are. But where training stops, nothing is worth more
    than a full state.
    """
    if need.is_last:
        return need.later_bytes if level == "full" else 0
    capacity = free_bytes + sum(one.num_bytes for one in checkpoints if one.status == "committed" and not one.is_pinned)
    thresholds = _thresholds(need, rules)
    if level == "full" and not need.is_stop and capacity - need.later_bytes < thresholds.full:
        return need.later_bytes + thresholds.weights
    return need.final_bytes


def _apply(
    checkpoints: Sequence[Checkpoint], decisions: Sequence[RetentionDecision], need: SaveRequirements
) -> list[Checkpoint]:
    """Return what is there once *decisions* are carried out."""
    actions = {id(decision.checkpoint): decision.action for decision in decisions}
    found = []
    for one in checkpoints:
        action = actions.get(id(one), "keep")
        if action == "strip":
            found.append(replace(one, content="weights", num_bytes=need.weights_bytes))
        elif action == "keep":
            found.append(one)
    return found


def _predict_next(checkpoints: Sequence[Checkpoint], level: SaveLevel, num_bytes: int) -> Checkpoint:
    """Return the checkpoint that is about to be saved, without its metric.

    An older best one is the worse case.
    """
    newest = max((one.order for one in checkpoints if one.status == "committed"), default=(0, 0))
    content: Literal["full", "weights"] = "weights" if level == "weights" else "full"
    return Checkpoint(path=Path("next"), step=newest[1] + 1, attempt=newest[0], content=content, num_bytes=num_bytes)
