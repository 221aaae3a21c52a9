"""Define retention policies: which checkpoints stay, why, and what each is worth.

A policy is a value that selects from a list of checkpoints; `AnyOf` joins several. Another policy is one more
class with `select` here, or anywhere else. Acting on what they say is in `decisions` and `rotation`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # the schema takes names from here, and commands that only read need no more
    from ..commit import Checkpoint

Goal = Literal["lowest", "highest"]
Limit = Literal["delete", "strip", "keep"]
_STRICTNESS: Mapping[Limit, int] = {"delete": 0, "strip": 1, "keep": 2}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Why a checkpoint stays.

    Attributes:
        reason: what `checkpoints prune` shows.
        value: what is worth more goes later when space is needed; of equals the oldest goes first.
        in_full: it keeps its training state also where others are stripped to their weights.
        at_most: the most that may be done to it when space is needed.
    """

    reason: str
    value: tuple[float, ...] = (0,)
    in_full: bool = False
    at_most: Limit = "delete"

    def __or__(self, other: Kept) -> Kept:
        """Return what both say together.

        That is the first's reason, and the stricter of everything else.
        """
        return Kept(
            reason=self.reason,
            value=max(self.value, other.value),
            in_full=self.in_full or other.in_full,
            at_most=max(self.at_most, other.at_most, key=_STRICTNESS.__getitem__),
        )


class RetentionPolicy(Protocol):
    """The interface of a retention policy.

    It sees nothing but the list, so the same list gives the same answer.
    """

    @property
    def num_protected(self) -> int:
        """Count the checkpoints that it never lets go for space.

        The newest and the pinned are not counted.
        """
        return 0

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        """Return what stays, by its place in *checkpoints*.

        *checkpoints* are the committed ones of a folder, oldest first.
        """


@dataclass(frozen=True)
class KeepLast(RetentionPolicy):
    """Keep the newest full states; the newest of all stays under every policy."""

    count: int = 1

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        kept = Kept(reason="among the last", value=(1,), in_full=True)
        places = range(len(checkpoints) - 1, -1, -1)
        full = (place for place in places if checkpoints[place].content == "full")
        return dict.fromkeys(itertools.islice(full, max(0, self.count)), kept)


@dataclass(frozen=True)
class KeepBest(RetentionPolicy):
    """Keep the best by the metric; of equals the newer.

    The very best may lose its training state, but never goes.
    """

    count: int = 1
    goal: Goal = "lowest"

    @property
    def num_protected(self) -> int:
        return min(1, self.count)

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        sign = -1 if self.goal == "highest" else 1
        measured = [(sign * one.metric, -place) for place, one in enumerate(checkpoints) if one.metric is not None]
        best = heapq.nsmallest(self.count, measured)
        return {
            -place: Kept(reason="among the best", value=(2, -rank), at_most="strip" if rank == 0 else "delete")
            for rank, (_, place) in enumerate(best)
        }


@dataclass(frozen=True)
class KeepEverySteps(RetentionPolicy):
    """Keep those at the multiples of a number of steps.

    They stay for as long as there is space.
    """

    num_steps: int

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        kept = Kept(reason=f"every {self.num_steps} steps")
        return {place: kept for place, one in enumerate(checkpoints) if one.step % self.num_steps == 0}


@dataclass(frozen=True)
class KeepSteps(RetentionPolicy):
    """Keep those of some steps, which are wanted later.

    They may lose their training state, but never go.
    """

    steps: tuple[int, ...]

    @property
    def num_protected(self) -> int:
        return len(self.steps)

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        kept = Kept(reason="its step is to be kept", value=(3,), at_most="strip")
        return {place: kept for place, one in enumerate(checkpoints) if one.step in self.steps}


@dataclass(frozen=True)
class Pinned(RetentionPolicy):
    """Keep those that a user pinned, as they are."""

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        kept = Kept(reason="pinned", in_full=True, at_most="keep")
        return {place: kept for place, one in enumerate(checkpoints) if one.is_pinned}


@dataclass(frozen=True)
class AnyOf(RetentionPolicy):
    """Keep what any of several policies keeps.

    The first of them that does gives the reason.
    """

    policies: tuple[RetentionPolicy, ...]

    @property
    def num_protected(self) -> int:
        return sum(policy.num_protected for policy in self.policies)

    def select(self, checkpoints: Sequence[Checkpoint]) -> Mapping[int, Kept]:
        found: dict[int, Kept] = {}
        for policy in self.policies:
            for place, kept in policy.select(checkpoints).items():
                found[place] = found[place] | kept if place in found else kept
        return found


@dataclass(frozen=True, kw_only=True)
class RetentionRules:
    """The rules of retention: what stays, and what becomes of the rest.

    *strips* says that what stays for another reason than being new or pinned keeps its weights only; *archives*,
    that what goes is moved to the archive.
    """

    policy: RetentionPolicy
    strips: bool = False
    archives: bool = False


def standard_rules(
    *,
    keep_last: int = 1,
    keep_best: int = 1,
    keep_every_steps: int | None = None,
    keep_steps: tuple[int, ...] = (),
    goal: Goal = "lowest",
    strips: bool = False,
    archives: bool = False,
) -> RetentionRules:
    """Return the rules that a recipe's keys and the command line can say."""
    policies = (Pinned(), KeepLast(keep_last), KeepBest(keep_best, goal), KeepSteps(keep_steps))
    every = (KeepEverySteps(keep_every_steps),) if keep_every_steps else ()
    return RetentionRules(policy=AnyOf((*policies, *every)), strips=strips, archives=archives)
