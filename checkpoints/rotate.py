"""Carry verdicts out: the rename comes first, so that a reader sees a checkpoint whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .. import files
from .commit import Checkpoint, committed
from .retention import Policy, decide


def rotate(folder: Path, policy: Policy, check_fence: Callable[[], None]) -> Sequence[Checkpoint]:
    """Delete what *policy* lets go of in *folder*, and return it.

    Raises:
        FencedError: a newer attempt exists; what is left is left.
    """
    gone = []
    for verdict in decide(committed(folder), policy):
        if verdict.action == "delete":
            check_fence()
            files.remove_tree(verdict.checkpoint.path)
            gone.append(verdict.checkpoint)
    return gone
