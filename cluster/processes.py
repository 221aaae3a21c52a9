"""Processes that leave no orphan behind.

Children die with their parent; stray ones are adopted and ended. torchrun starts its workers in sessions of their own,
and so do the services of trackers: killing a process group misses them. Linux gives two means that do not: a signal at
the parent's death, and the role of the one to whom orphaned descendants are given.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_S = 5.0  # how long SIGKILL may take; a process in an uninterruptible read outlives any wait
PARENT_VARIABLE = "SOUSBATCH_PARENT"


def die_with_parent(number: signal.Signals) -> bool:
    """Ask the kernel to send *number* to this process when its parent dies.

    Return whether it was asked. Only what was started with `child_environment` is bound: a job run by hand is its own
    master. The parent may have died before this call, so it is looked for among the ancestors; a wrapper such as
    `conda run` may stand between. The kernel's signal needs Linux.
    """
    expected = os.environ.get(PARENT_VARIABLE)
    if expected is None:
        return False
    os.environ |= child_environment({})  # what its own children will expect
    _prctl(_PR_SET_PDEATHSIG, int(number))
    pid, _, namespace = expected.partition("@")
    if namespace == _pid_namespace() and int(pid) not in [process.pid for process in psutil.Process().parents()]:
        os.kill(os.getpid(), number)
    return True


def child_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return *environment* for a child that calls `die_with_parent`."""
    return environment | {PARENT_VARIABLE: f"{os.getpid()}@{_pid_namespace()}"}


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies.

    Stray descendants can then be found and ended.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(*, grace_s: float) -> int:
    """End every descendant of this process and return how many there were.

    They get SIGTERM, and SIGKILL after *grace_s* seconds; with no grace SIGKILL at once. The
    caller's own children stay for it to reap, so that it still learns their exit codes.
    """
    found = descendants()
    if found and grace_s > 0:
        _signal(found, signal.SIGTERM)
        _wait_until_none(grace_s)
    deadline = time.monotonic() + _KILL_S
    while (alive := descendants()) and time.monotonic() < deadline:  # one may have forked since the last look
        _signal(alive, signal.SIGKILL)
        _wait_until_none(0.05)
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


def leave(code: int) -> NoReturn:
    """Exit with *code*, and end the process once its exit handlers have run.

    Python is not taken down: a thread of torch's that asks for the interpreter meanwhile would abort the process, and
    what a rank has finished would count as failed with exit code 134.
    """

    def end() -> None:  # the last one to be registered is the first to be called
        atexit.unregister(end)
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    atexit.register(end)
    sys.exit(code)


def _wait_until_none(timeout_s: float) -> None:
    # not psutil.wait_procs: it reaps the caller's children, whose Popen then reports 0
    deadline = time.monotonic() + timeout_s
    while descendants() and time.monotonic() < deadline:
        time.sleep(0.02)


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _pid_namespace() -> str:
    """Name the set of processes that this process's number belongs to.

    A container has its own.
    """
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    done: int = ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    return done == 0
