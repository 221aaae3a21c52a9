"""Define save levels.

A level says how much of a training state a save keeps, from all of it to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SaveLevel = Literal["full", "weights", "none"]
SAVE_LEVELS: tuple[SaveLevel, ...] = ("full", "weights", "none")  # the highest first


@dataclass(frozen=True)
class Held:
    """The numbers of full states and of weights that a stage holds at its peak."""

    num_full: int
    num_weights: int

    def bytes_of(self, full_bytes: int, weights_bytes: int) -> int:
        return self.num_full * full_bytes + self.num_weights * weights_bytes


def levels_from(highest: SaveLevel) -> Sequence[SaveLevel]:
    """Return the levels at which something is saved, not above *highest*."""
    return SAVE_LEVELS[SAVE_LEVELS.index(highest) : -1]


def least_held(level: SaveLevel, num_protected: int) -> Held:
    """Return the least that a training holds which saves at *level* each time.

    The newest and its successor that is being written, beside the weights of the *num_protected* that a policy never
    lets go. At "none" only the weights at the end are saved.
    """
    if level == "full":
        return Held(2, num_protected)
    return Held(0, 2 + num_protected) if level == "weights" else Held(0, 1)
