"""Define what a tracker is, list the trackers, and start those of a run.

Tracking mirrors the ledger and decides nothing. A job calls its `Trackers`; they pass each call on to what the recipe
names, and drop what fails or does not answer. No job fails because of a tracker, or waits long for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..plugins import Registry
from ..redaction import redacted
from .identity import Alert, Identity, read_identity

_START_S, _FINISH_S, _SEND_S = 32.0, 65.0, 40.0  # a tracker that takes longer is left alone
_FORGIVEN, _FORGIVEN_S = ("table", "artifact", "alert"), 10.0  # a tracker may have no such method, or fail in it


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Files that a task read or made: a data set, a model, predictions.

    *path* is a file or folder, *digest* ours of its content, *name* unique in the run. *facts* say more of it.
    """

    name: str
    kind: str
    path: Path
    digest: str
    is_made: bool
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended, where its tracker was killed before it could say so."""

    exit_code: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of something to be sent; without a *problem* it has arrived.

    A problem that is not *of_run* is the same for all runs, such as a missing key.
    """

    what: str
    problem: str = ""
    of_run: bool = True


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tracker shows a run: an address, or a command that opens it.

    *link* is "" where the tracker shows nothing yet; *has_left* says that not all is known to have arrived.
    """

    tracker: str
    link: str = ""
    has_left: bool = False


class Tracker(Protocol):
    """What shows the numbers of one task.

    It may raise: jobs call `Trackers`, which catch it. The table holds classes that are made without arguments.
    Import heavy packages in `start`. One that cannot show a table or an artifact, tell a person or be stopped from has
    no such method. One that needs a key has the static method `doubt`, which `doubts` calls, and one that a person can
    open the static method `link`, which `places` calls. One that leaves files to be sent later has the static methods
    `has_left` and `send`, which `has_left` and `send_left` of this module call.
    """

    def start(self, identity: Identity) -> None:
        """Open the tracked run of *identity*, or the one that earlier attempts began."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the values of a step; an attempt that resumes repeats some steps."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show final values."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a small table of texts and numbers, in place of one of that name."""

    def artifact(self, artifact: Artifact) -> None:
        """Show what the task read or made, by reference."""

    def alert(self, title: str, text: str) -> None:
        """Tell a person."""

    def wants_stop(self) -> bool:
        """Say whether a person wants the job to save and end; asked once a second."""

    def finish(self, exit_code: int) -> None:
        """End the run with the exit code of the job; nothing is called after."""


TRACKERS: Registry[Callable[[], Tracker]] = Registry(
    "tracker",
    "sousbatch.trackers",
    {
        "wandb": "tracking.wandb:WandbTracker",
        "tensorboard": "tracking.tensorboard:TensorBoardTracker",
        "trackio": "tracking.trackio:TrackioTracker",
    },
)
OPTIONAL = ("tensorboard", "trackio")  # packages of these names, which not everybody has


class Trackers:
    """The trackers of one task, or none. What one of them raises ends that one only."""

    def __init__(self) -> None:
        self._running: dict[str, Tracker] = {}
        self.alerts: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._running)

    def start(self, name: str, identity: Identity) -> None:
        """Start one more tracker."""
        with self._guarded(name):
            tracker = TRACKERS.load(name)()

            def begin() -> None:
                tracker.start(identity)
                self._running[name] = tracker

            try:
                _within(_START_S, begin)
            except TimeoutError:  # where 32 tasks import a package at once, it takes its time
                text = "%s has not begun after %g s; the job goes on, and is shown from when it has"
                _warn(text, name, _START_S)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the values of a step."""
        self._call("log", step, values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show final values."""
        self._call("summary", values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a small table in the place of an earlier one of that name."""
        self._call("table", name, columns, rows)

    def artifact(self, artifact: Artifact) -> None:
        """Show what the task read or made."""
        self._call("artifact", artifact)

    def alert(self, kind: Alert, title: str, text: str) -> None:
        """Tell a person, where the recipe wants them to be told of this *kind*."""
        if kind in self.alerts:
            self._call("alert", title, text)

    def wants_stop(self) -> bool:
        """Say whether a person asked in a tracker that the job saves and ends."""
        for name, tracker in list(self._running.items()):
            with self._guarded(name):
                if hasattr(tracker, "wants_stop") and tracker.wants_stop():
                    return True
        return False

    def finish(self, exit_code: int, error: str = "") -> None:
        """End the runs with the exit code of the job and the error that ended it.

        A second call does nothing.
        """
        if error:
            self.summary({"error": error})
        for name in list(self._running):
            with self._guarded(name):
                tracker = self._running.pop(name)
                _within(_FINISH_S, partial(tracker.finish, exit_code))

    def _call(self, method: str, *values: Any) -> None:
        for name, tracker in list(self._running.items()):
            if method not in _FORGIVEN:
                with self._guarded(name):
                    getattr(tracker, method)(*values)
            elif hasattr(tracker, method):
                try:
                    _within(_FORGIVEN_S, partial(getattr(tracker, method), *values))
                except Exception as error:  # what it could not show is not worth the rest
                    _warn(
                        "%s does not show %s %s: %s",
                        name,
                        method,
                        getattr(values[0], "name", values[0]),
                        redacted(str(error)),
                    )

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker may raise any error; the job carries on
            _warn("tracking with %s is off: %s", name, redacted(str(error)))
            self._running.pop(name, None)


def _within(limit_s: float, call: Callable[[], None]) -> None:
    """Call in a thread of its own, and raise what it raises.

    Raises:
        TimeoutError: it is not done after *limit_s*.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError(f"it took longer than {limit_s:g} s")
    if raised:
        raise raised[0]


def start(
    trackers: Trackers,
    folder: Path,
    *,
    stage: str,
    kind: str,
    task: int | None,
    attempt: int,
    beside_others: bool = False,
    node: int = 0,
) -> None:
    """Start the trackers that a run named at submission.

    *folder* is its tracking folder. *task* is None where the stage has only one. A task that runs *beside_others* which
    show the same is shown only where each task has a tracked run of its own, a *node* beside the first one only
    where the recipe wants the metrics of all.
    """
    try:
        run = read_identity(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn("tracking is off, since the identity of the run cannot be read: %r", error)
        return
    if (beside_others and run.per != "task") or (node and run.mode != "shared"):
        return
    trackers.alerts = run.alerts
    for name in run.trackers if run.mode != "disabled" else ():
        trackers.start(name, replace(run.of_task(stage, kind, task, folder, attempt), node=node))


def doubts(names: Sequence[str], mode: str, environment: Mapping[str, str], alerts: Sequence[str] = ()) -> list[str]:
    """Return a sentence for what each tracker would not find in *environment*.

    Another one says that nobody sends the *alerts*.
    """
    found = [TRACKERS.load(name) for name in names if mode in ("online", "shared")]
    said = [doubt for tracker in found if hasattr(tracker, "doubt") and (doubt := tracker.doubt(mode, environment))]
    if alerts and (mode == "disabled" or not any(hasattr(TRACKERS.load(name), "alert") for name in names)):
        said.append(f"tracking.alerts=[{','.join(alerts)}]: no tracker of this run sends them; wandb does")
    return said


def places(folders: Sequence[Path]) -> list[Place]:
    """Return where the trackers of a run show it.

    *folders* are its tracking folder, of a sweep those of its points too. A tracker with neither a link nor something
    left is not there.
    """
    found = []
    try:
        run = read_identity(folders[0])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    for name in run.trackers if run.mode != "disabled" else ():
        with suppress(Exception):  # a tracker may raise any error, or not be installed any more
            tracker: Any = TRACKERS.load(name)
            link = tracker.link(folders, run) if hasattr(tracker, "link") else None
            left = hasattr(tracker, "send") and any(tracker.has_left(folder) for folder in folders)
            found += [Place(tracker=name, link=link or "", has_left=left)] if link or left else []
    return found


def has_left(folder: Path) -> bool:
    """Say whether a run, by its tracking folder, recorded what did not arrive yet."""
    return any(tracker.has_left(folder) for tracker in _senders(folder))


def send_left(
    folder: Path, endings: Mapping[str, Ending], *, limit_s: float, by_itself: bool = False
) -> Iterator[Outcome]:
    """Send what ended attempts recorded, each once and in order.

    Yield what became of each.

    *endings* are those of attempts by `part_name`. What is not sent after *limit_s* stays for the next time. What
    happens *by_itself*, and not because a person asked, is left where the recipe or the shell wants no network.
    """
    for tracker in _senders(folder):
        yield from tracker.send(folder, read_identity(folder), endings, limit_s=limit_s, by_itself=by_itself)


def send_at_end(folder: Path, endings: Mapping[str, Ending]) -> list[Outcome]:
    """Send what is left at the end of an attempt, as far as that takes no time.

    It raises nothing.
    """
    found: list[Outcome] = []
    try:
        if has_left(folder):
            _within(_SEND_S + 5, lambda: found.extend(send_left(folder, endings, limit_s=_SEND_S, by_itself=True)))
    except Exception as error:  # a tracker may raise any error
        found.append(Outcome(what="tracking", problem=redacted(str(error))))
    return found


def _senders(folder: Path) -> list[Any]:
    try:
        run = read_identity(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found = [TRACKERS.load(name) for name in run.trackers if run.mode != "disabled"]
    return [tracker for tracker in found if hasattr(tracker, "send")]


def _warn(text: str, *values: object) -> None:
    import logging  # 5 ms, which every command would pay that knows the names of trackers

    logging.getLogger(__name__).warning(text, *values)
