"""Choose a checkpoint of a folder: the best, the last, or that of a step."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import NotFoundError
from .commit import Checkpoint, best_committed, committed, last_committed
from .retention.policies import Goal

_STEP = re.compile(r"step-0*([1-9]\d*)")


def step_named(choice: str) -> int | None:
    """Return the step of a choice such as "step-200"; others name none."""
    found = _STEP.fullmatch(choice)
    return int(found[1]) if found else None


def is_choice(text: str) -> bool:
    """Say whether *text* can choose a checkpoint."""
    return text in ("best", "last") or step_named(text) is not None


def choose_checkpoint(folder: Path, choice: str, goal: Goal) -> Checkpoint:
    """Return the committed checkpoint of *folder* that *choice* means.

    Of one step the full state is taken before its weights.

    Raises:
        NotFoundError: there is none; the message names those that are there.
    """
    step = step_named(choice)
    if step is not None:
        found = next((one for one in reversed(committed(folder)) if one.step == step), None)
    else:
        found = best_committed(folder, goal) if choice == "best" else last_committed(folder)
    if found is None:
        there = ", ".join(f"step-{number}" for number in dict.fromkeys(one.step for one in committed(folder)))
        raise NotFoundError(f"{folder} has no committed checkpoint {choice!r}; it has {there or 'none'}")
    return found
