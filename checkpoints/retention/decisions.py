"""Decide what becomes of checkpoints: pure functions from a list to decisions.

`decide` says what the policies let go where space is no matter. `make_room` goes further, the least valuable
first, so that the next checkpoint fits. Acting on decisions is in `rotation`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from ..commit import Checkpoint
from .policies import Kept, RetentionPolicy, RetentionRules

Action = Literal["keep", "strip", "archive", "delete"]
_SPACE = "space for the next one"
_NEWEST = Kept(reason="among the last", in_full=True, at_most="keep")


@dataclass(frozen=True, kw_only=True)
class RetentionDecision:
    """The fate of a checkpoint, its reason, and how many bytes it frees."""

    checkpoint: Checkpoint
    action: Action
    reason: str
    frees_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class FreeingPlan:
    """The decisions that free space, in order, and whether they are enough."""

    decisions: tuple[RetentionDecision, ...]
    is_enough: bool


@dataclass(frozen=True, kw_only=True)
class _Selection:
    """The committed checkpoints, oldest first, and why some stay.

    The reasons are by `id` (hashing 10,000 paths takes 100 ms). *spare* are the weights that a killed strip left beside
    the full state.
    """

    mine: Sequence[Checkpoint]
    spare: frozenset[int]
    kept: Mapping[int, Kept]


def _select(checkpoints: Sequence[Checkpoint], policy: RetentionPolicy) -> _Selection:
    mine = sorted((one for one in checkpoints if one.status == "committed"), key=attrgetter("attempt", "step"))
    light = [one for one in mine if one.content == "weights"]
    in_full = {one.order for one in mine if one.content == "full"} if light else set()
    spare = frozenset(id(one) for one in light if one.order in in_full)
    candidates = [one for one in mine if id(one) not in spare] if spare else mine
    kept = {id(candidates[place]): reason for place, reason in policy.select(candidates).items()}
    newest_full = (one for one in reversed(mine) if one.content == "full")
    for one in (*itertools.islice(newest_full, 1), *candidates[-1:]):  # to resume from, and weights where newer
        kept[id(one)] = kept.get(id(one), _NEWEST) | _NEWEST
    return _Selection(mine=mine, spare=spare, kept=kept)


def decide(
    checkpoints: Sequence[Checkpoint], rules: RetentionRules, *, weights_bytes: int = 0
) -> tuple[RetentionDecision, ...]:
    """Return one decision for each of *checkpoints*, in their order.

    Only committed ones ever go, and never the newest of them. *weights_bytes* is what one holds that was stripped.
    """
    return _decide(checkpoints, _select(checkpoints, rules.policy), rules, weights_bytes)


def _decide(
    checkpoints: Sequence[Checkpoint], selection: _Selection, rules: RetentionRules, weights_bytes: int
) -> tuple[RetentionDecision, ...]:
    kept_by_id, spare, strips = selection.kept, selection.spare, rules.strips

    def decision(one: Checkpoint) -> RetentionDecision:
        if one.status != "committed":
            return RetentionDecision(checkpoint=one, action="keep", reason=f"{one.status}, not ours to remove")
        kept = kept_by_id.get(id(one))
        if kept is None:
            if spare and id(one) in spare:
                return _remove_spare(one)
            return _remove(one, rules, "older than the last and not among the best")
        saved = _saved_by_strip(one, weights_bytes) if strips and not kept.in_full else 0
        return RetentionDecision(
            checkpoint=one, action="strip" if saved else "keep", reason=kept.reason, frees_bytes=saved
        )

    return tuple(map(decision, checkpoints))


def _remove_spare(one: Checkpoint) -> RetentionDecision:
    if one.is_pinned:
        return RetentionDecision(checkpoint=one, action="keep", reason="pinned")
    return RetentionDecision(checkpoint=one, action="delete", reason="still there in full", frees_bytes=one.num_bytes)


def _remove(one: Checkpoint, rules: RetentionRules, reason: str) -> RetentionDecision:
    action: Action = "archive" if rules.archives else "delete"
    return RetentionDecision(checkpoint=one, action=action, reason=reason, frees_bytes=one.num_bytes)


def _saved_by_strip(one: Checkpoint, weights_bytes: int) -> int:
    """Return what stripping *one* to its weights frees.

    It is 0 for a checkpoint that holds weights only.
    """
    return max(0, one.num_bytes - weights_bytes) if one.content == "full" else 0


def make_room(
    checkpoints: Sequence[Checkpoint], rules: RetentionRules, *, need_bytes: int, free_bytes: int, weights_bytes: int
) -> FreeingPlan:
    """Return what must be done so that *need_bytes* are free.

    *free_bytes* are free now. First goes what the policies let go. Then those that they keep, by their value. As few as
    possible of them go, since stripping to weights comes before going. The newest stay as they are, and the others as
    far as their policies ask. A stripped copy is written before the full one goes, so it needs *weights_bytes* first.
    Where even all of this is not enough, nothing but what the policies let go is touched.
    """
    if free_bytes >= need_bytes:
        return FreeingPlan(decisions=(), is_enough=True)
    selection = _select(checkpoints, rules.policy)
    settled = _decide(selection.mine, selection, rules, weights_bytes)
    first = [one for one in settled if one.action in ("delete", "archive")]
    free = free_bytes + sum(one.frees_bytes for one in first)
    if free >= need_bytes:
        return FreeingPlan(decisions=tuple(first), is_enough=True)
    ranked, num_may_go = _rank(selection)

    def further(count: int) -> tuple[list[Checkpoint], int]:
        """Return what is stripped when the first *count* go.

        Return also the bytes that are free then.
        """
        left, stripped = free + sum(one.num_bytes for one in ranked[:count]), []
        for one in ranked[count:]:
            saved = _saved_by_strip(one, weights_bytes)
            if left < need_bytes and saved > 0 and left >= weights_bytes:
                stripped.append(one)
                left += saved
        return stripped, left

    # going frees more than stripping, so the first count that is enough can be searched for
    count = bisect.bisect_left(range(num_may_go + 1), True, key=lambda number: further(number)[1] >= need_bytes)
    if count > num_may_go:
        return FreeingPlan(decisions=tuple(first), is_enough=False)
    gone = (_remove(one, rules, _SPACE) for one in ranked[:count])
    stripped = (
        RetentionDecision(
            checkpoint=one, action="strip", reason=_SPACE, frees_bytes=_saved_by_strip(one, weights_bytes)
        )
        for one in further(count)[0]
    )
    return FreeingPlan(decisions=(*first, *gone, *stripped), is_enough=True)


def _rank(selection: _Selection) -> tuple[list[Checkpoint], int]:
    """Return what may be touched when space is needed, least valuable first.

    Return also how many of these may go.
    """
    found = [
        (kept.at_most != "delete", kept.value, one)
        for one in selection.mine
        if (kept := selection.kept.get(id(one))) is not None and kept.at_most != "keep"
    ]
    found.sort(key=lambda each: each[:2])  # stable, so the oldest first among equals
    return [one for _, _, one in found], sum(not is_protected for is_protected, _, _ in found)
