"""Which checkpoints stay: pure functions from a list to verdicts.

`decide` is what the policies say with room to spare; `make_room` is what goes further, least
valuable first, so that the next checkpoint fits. Acting on verdicts is in `rotate.py`.
"""

from __future__ import annotations

import bisect
from collections.abc import Container, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from ..commit import Checkpoint

Action = Literal["keep", "thin", "archive", "delete"]
_ROOM = "room for the next one"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What stays: the newest, the best by the metric, every so many steps, and the pinned.

    *thins* says that what stays for another reason than being new keeps its weights only;
    *archives*, that what goes is moved to the archive.
    """

    keep_last: int = 1
    keep_best: int = 1
    keep_every_steps: int | None = None
    goal: Literal["lowest", "highest"] = "lowest"
    thins: bool = False
    archives: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happens to a checkpoint, why, and how many bytes it frees."""

    checkpoint: Checkpoint
    action: Action
    reason: str
    frees_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Clearing:
    """What is done, in this order, to make room, and whether that is enough."""

    verdicts: tuple[Verdict, ...]
    is_enough: bool


@dataclass(frozen=True, kw_only=True)
class _Ranks:
    """The committed checkpoints, oldest first, and by `id` (hashing 10,000 paths takes 100 ms) what a rule keeps."""

    mine: Sequence[Checkpoint]
    spare: frozenset[int]
    newest: frozenset[int]
    last: frozenset[int]
    best: Sequence[int]


def _rank(checkpoints: Sequence[Checkpoint], policy: Policy) -> _Ranks:
    mine = sorted((one for one in checkpoints if one.status == "committed"), key=attrgetter("attempt", "step"))
    full = [one for one in mine if one.content == "full"]
    # a thinning that was cut off leaves the weights beside the full one
    light = [one for one in mine if one.content == "weights"]
    whole = {one.order for one in full} if light else set()
    spare = frozenset(id(one) for one in light if one.order in whole)
    measured = [one for one in reversed(mine) if one.metric is not None and id(one) not in spare]
    measured.sort(key=lambda one: one.metric or 0.0, reverse=policy.goal == "highest")
    return _Ranks(
        mine=mine,
        spare=spare,
        # the newest to resume from, and the newest weights where they are newer
        newest=frozenset(id(one) for one in (*full[-1:], *mine[-1:])),
        last=frozenset(id(one) for one in full[-max(1, policy.keep_last) :]),
        best=[id(one) for one in measured[: policy.keep_best]],
    )


def decide(checkpoints: Sequence[Checkpoint], policy: Policy, *, weights_bytes: int = 0) -> tuple[Verdict, ...]:
    """Return one verdict for each of *checkpoints*, in their order.

    Only committed ones ever go, and never the newest of them or a pinned one. *weights_bytes* is
    what a thinned one holds.
    """
    return _verdicts(checkpoints, _rank(checkpoints, policy), policy, weights_bytes)


def _verdicts(
    checkpoints: Sequence[Checkpoint], ranks: _Ranks, policy: Policy, weights_bytes: int
) -> tuple[Verdict, ...]:
    newest, best = ranks.newest | ranks.last, set(ranks.best)

    def verdict(one: Checkpoint) -> Verdict:
        if one.status != "committed":
            return Verdict(checkpoint=one, action="keep", reason=f"{one.status}, not ours to remove")
        if one.is_pinned:
            return Verdict(checkpoint=one, action="keep", reason="pinned")
        if id(one) in ranks.spare:
            return Verdict(checkpoint=one, action="delete", reason="still there in full", frees_bytes=one.num_bytes)
        if id(one) in newest:
            return Verdict(checkpoint=one, action="keep", reason="among the last")
        kept = "among the best" if id(one) in best else ""
        if not kept and policy.keep_every_steps and one.step % policy.keep_every_steps == 0:
            kept = f"every {policy.keep_every_steps} steps"
        if not kept:
            return _gone(one, policy, "older than the last and not among the best")
        saved = _saved(one, weights_bytes) if policy.thins else 0
        return Verdict(checkpoint=one, action="thin" if saved else "keep", reason=kept, frees_bytes=saved)

    return tuple(map(verdict, checkpoints))


def _gone(one: Checkpoint, policy: Policy, reason: str) -> Verdict:
    action: Action = "archive" if policy.archives else "delete"
    return Verdict(checkpoint=one, action=action, reason=reason, frees_bytes=one.num_bytes)


def _saved(one: Checkpoint, weights_bytes: int) -> int:
    """Return what thinning *one* frees; 0 for one that holds weights only."""
    return max(0, one.num_bytes - weights_bytes) if one.content == "full" else 0


def make_room(
    checkpoints: Sequence[Checkpoint], policy: Policy, *, need_bytes: int, free_bytes: int, weights_bytes: int
) -> Clearing:
    """Return what must be done so that *need_bytes* are free, where *free_bytes* are now.

    First goes what the policies let go. Then those that they keep, least valuable first: those
    of every so many steps, older last ones, lesser best ones. As few as possible of them go, since
    thinning comes before going; the best is at most thinned. The newest and the pinned stay as
    they are. A thinned copy is written before the full one goes, so it needs *weights_bytes* first.
    Where even all of this is not enough, nothing but what the policies let go is touched.
    """
    if free_bytes >= need_bytes:
        return Clearing(verdicts=(), is_enough=True)
    ranks = _rank(checkpoints, policy)
    settled = _verdicts(ranks.mine, ranks, policy, weights_bytes)
    first = [one for one in settled if one.action in ("delete", "archive")]
    free = free_bytes + sum(one.frees_bytes for one in first)
    if free >= need_bytes:
        return Clearing(verdicts=tuple(first), is_enough=True)
    ranked, num_may_go = _by_value(ranks, {id(one.checkpoint) for one in first})

    def further(count: int) -> tuple[list[Checkpoint], int]:
        """Return what is thinned when the first *count* go, and the bytes that are free then."""
        left, thinned = free + sum(one.num_bytes for one in ranked[:count]), []
        for one in ranked[count:]:
            saved = _saved(one, weights_bytes)
            if left < need_bytes and saved > 0 and left >= weights_bytes:
                thinned.append(one)
                left += saved
        return thinned, left

    # going frees more than thinning, so the first count that is enough can be searched for
    count = bisect.bisect_left(range(num_may_go + 1), True, key=lambda number: further(number)[1] >= need_bytes)
    if count > num_may_go:
        return Clearing(verdicts=tuple(first), is_enough=False)
    gone = (_gone(one, policy, _ROOM) for one in ranked[:count])
    thinned = (
        Verdict(checkpoint=one, action="thin", reason=_ROOM, frees_bytes=_saved(one, weights_bytes))
        for one in further(count)[0]
    )
    return Clearing(verdicts=(*first, *gone, *thinned), is_enough=True)


def _by_value(ranks: _Ranks, gone: Container[int]) -> tuple[list[Checkpoint], int]:
    """Return what may be touched when room is needed, least valuable first, and how many of these may go.

    The best comes last and is not among these.
    """
    place = {one: number for number, one in enumerate(ranks.best)}
    free_to_touch = [
        one for one in ranks.mine if not one.is_pinned and id(one) not in ranks.newest and id(one) not in gone
    ]

    def value(one: Checkpoint) -> tuple[int, int]:
        if id(one) in place:
            return (2, -place[id(one)])
        return (1 if id(one) in ranks.last else 0, 0)

    ranked = sorted(free_to_touch, key=value)  # stable, so the oldest first among equals
    has_best = bool(ranked) and place.get(id(ranked[-1])) == 0
    return ranked, len(ranked) - has_best
