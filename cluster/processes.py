"""Processes that leave no orphan: children die with their parent, stray ones are adopted and ended.

torchrun starts its workers in sessions of their own, and so does W&B's service: killing a
process group misses them. Linux gives two means that do not: a signal at the parent's death,
and the role of the one to whom orphaned descendants are given.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
PARENT_VARIABLE = "SOUSBATCH_PARENT_PID"


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send *number* to this process when its parent dies.

    The parent's pid is read from the environment, since it may have died before this call.
    Does nothing where the kernel is not Linux.
    """
    expected = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # what its own children will expect
    if _prctl(_PR_SET_PDEATHSIG, int(number)) and expected is not None and os.getppid() != int(expected):
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that they can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def child_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return *environment* for a child that calls `die_with_parent`."""
    return environment | {PARENT_VARIABLE: str(os.getpid())}


def end_descendants(*, grace_s: float) -> int:
    """End every descendant of this process and return how many there were.

    They get SIGTERM, and SIGKILL after *grace_s* seconds; with no grace SIGKILL at once.
    """
    found = descendants()
    if grace_s > 0:
        _signal(found, signal.SIGTERM)
        psutil.wait_procs(found, timeout=grace_s)
    _signal(descendants(), signal.SIGKILL)
    psutil.wait_procs(found, timeout=5)
    return len(found)


def descendants() -> list[psutil.Process]:
    """Return the living descendants of this process."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    done: int = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    return done == 0
