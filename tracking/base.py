"""Define what a tracker is, list the trackers, and start those of a run.

Tracking mirrors the ledger and decides nothing. A job calls the `Trackers` that `start` returns; they pass each
call on to what the recipe names, and drop what fails. No job fails because of a tracker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..plugins import Registry
from .identity import Identity, read_identity


class Tracker(Protocol):
    """What shows the numbers of one task.

    It may raise: jobs call `Trackers`, which catch it. The table holds classes that are made without arguments.
    Import heavy packages in `start`.
    """

    def start(self, identity: Identity) -> None:
        """Open the tracked run of *identity*, or the one that earlier attempts began."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the values of a step; an attempt that resumes repeats some steps."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show final values."""

    def finish(self, exit_code: int) -> None:
        """End the run with the exit code of the job; nothing is called after."""


TRACKERS: Registry[Callable[[], Tracker]] = Registry(
    "tracker", "sousbatch.trackers", {"wandb": "tracking.wandb:WandbTracker"}
)


class Trackers:
    """The trackers of one task, or none. What one of them raises ends that one only."""

    def __init__(self) -> None:
        self._running: dict[str, Tracker] = {}

    def start(self, name: str, identity: Identity) -> None:
        """Start one more tracker."""
        with self._guarded(name):
            tracker = TRACKERS.load(name)()
            tracker.start(identity)
            self._running[name] = tracker

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the values of a step."""
        for name, tracker in list(self._running.items()):
            with self._guarded(name):
                tracker.log(step, values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show final values."""
        for name, tracker in list(self._running.items()):
            with self._guarded(name):
                tracker.summary(values)

    def finish(self, exit_code: int) -> None:
        """End the runs with the exit code of the job."""
        for name, tracker in list(self._running.items()):
            with self._guarded(name):
                tracker.finish(exit_code)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker may raise any error; the job carries on
            _warn("tracking with %s is off: %s", name, error)
            self._running.pop(name, None)


def start(
    folder: Path, *, stage: str, kind: str, task: int | None, attempt: int, beside_others: bool = False
) -> Trackers:
    """Start what the run with tracking folder *folder* named at submission.

    *task* is None where the stage has only one. A task that runs *beside_others* which show the same is shown only
    where each task has a tracked run of its own.
    """
    trackers = Trackers()
    try:
        run = read_identity(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn("tracking is off, since the identity of the run cannot be read: %r", error)
        return trackers
    if beside_others and run.per != "task":
        return trackers
    for name in run.trackers if run.mode != "disabled" else ():
        trackers.start(name, run.of_task(stage, kind, task, folder, attempt))
    return trackers


def _warn(text: str, *values: object) -> None:
    import logging  # 5 ms, which every command would pay that knows the names of trackers

    logging.getLogger(__name__).warning(text, *values)
