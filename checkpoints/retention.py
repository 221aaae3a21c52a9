"""Which checkpoints stay: a pure function from a list to verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .commit import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What stays: the newest, the best by the metric, every so many steps, and the pinned."""

    keep_last: int = 1
    keep_best: int = 1
    keep_every_steps: int | None = None
    goal: Literal["lowest", "highest"] = "lowest"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happens to a checkpoint, and why."""

    checkpoint: Checkpoint
    action: Literal["keep", "delete"]
    reason: str


def decide(checkpoints: Sequence[Checkpoint], policy: Policy) -> tuple[Verdict, ...]:
    """Return one verdict for each of *checkpoints*, in their order.

    Only committed ones are ever deleted, and never the newest of them.
    """
    mine = sorted((one for one in checkpoints if one.status == "committed"), key=lambda one: one.order)
    sign = 1 if policy.goal == "lowest" else -1
    measured = sorted(
        (one for one in mine if one.metric is not None), key=lambda one: (sign * (one.metric or 0.0), -one.step)
    )
    last = {one.path for one in mine[-max(1, policy.keep_last) :]}
    best = {one.path for one in measured[: policy.keep_best]}

    def verdict(one: Checkpoint) -> Verdict:
        if one.status != "committed":
            return Verdict(checkpoint=one, action="keep", reason=f"{one.status}, not ours to remove")
        if one.path in last:
            return Verdict(checkpoint=one, action="keep", reason="among the last")
        if one.path in best:
            return Verdict(checkpoint=one, action="keep", reason="among the best")
        if one.is_pinned:
            return Verdict(checkpoint=one, action="keep", reason="pinned")
        if policy.keep_every_steps and one.step % policy.keep_every_steps == 0:
            return Verdict(checkpoint=one, action="keep", reason=f"every {policy.keep_every_steps} steps")
        return Verdict(checkpoint=one, action="delete", reason="older than the last and not among the best")

    return tuple(verdict(one) for one in checkpoints)
