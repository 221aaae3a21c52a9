"""Run a stage: `python -m sousbatch.launchers.stage_process RUN STAGE`.

It verifies what was frozen, opens an attempt, picks address and port, starts the ranks, turns
signals into the stop flag, reads the exit code and decides what is next. The job itself is met
by module path, arguments and exit code only.
"""

from __future__ import annotations

import getpass
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from .. import __version__, files, ledger
from ..checkpoints.capacity.reservations import shared_runs_dir, submitted_run
from ..cluster import processes
from ..errors import (
    EXIT_DEVICE_MEMORY,
    EXIT_DIVERGED,
    EXIT_NO_ROOM,
    EXIT_STOPPED,
    FencedError,
    SousbatchError,
    is_no_room,
    no_room_named,
)
from ..events import Ended, Error, Started
from ..job_environment import JobEnvironment
from ..ledger_queries import endings, is_finished, rank_codes
from ..recipes.plan import Batch, Plan, Stage, read_plan
from ..run_folder import RunPaths
from ..tracking.base import Ending, send_at_end
from ..tracking.identity import part_name
from .attempts import Attempt, Stop, first_batch, next_batch, read_attempts
from .base import Placement
from .freeze import verify
from .registry import launcher_named
from .reservations import release_dead, reserve

_POLL_S = 0.1
_LOG_END_BYTES = 1 << 18  # srun's own lines are among the last of a log
_STRAGGLER_S = 30.0  # how long the other nodes may take after the first one failed


class _Task:
    """One task of a stage, in this process."""

    def __init__(
        self, paths: RunPaths, plan: Plan, stage: Stage, given: JobEnvironment, where: Placement, parent: int | None
    ) -> None:
        self._paths, self._plan, self._stage, self._given, self._where = paths, plan, stage, given, where
        self._parent = parent
        self._task, self._kind = given.task, stage.record
        self._flag = paths.stop_flag(stage.name, given.task)
        self._is_stopping = False
        self._running: list[subprocess.Popen[bytes]] = []
        self._number = 0

    def run(self) -> int:
        """Run attempts until there is no next one; return the last one's exit code."""
        files.make_private_dir(self._flag.parent)
        self._flag.unlink(missing_ok=True)  # left by an attempt that was killed
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        events = ledger.read(self._paths.ledger_dir, max_steps=1)
        past = read_attempts(events, self._stage.name, self._task, self._stage.batch)
        refusal = self._where.refusal(self._stage, events, past)
        if refusal is not None:
            _say(refusal.reason)
            return refusal.exit_code
        batch = first_batch(past, self._stage)
        if self._kind.leaves == "checkpoints":  # a save counts what others are promised, and no rank asks for jobs
            with suppress(OSError, SousbatchError):
                # not as watchers, who share an answer for half a minute
                release_dead(shared_runs_dir(self._paths), launcher_named, submitted_run(self._paths))
        try:
            while True:
                attempt = self._attempt(batch)
                past.append(attempt)
                following = self._after(attempt)
                if isinstance(following, Stop):
                    _say(f"attempt {attempt.number} ended: {following.reason}")
                    self._send_left()
                    if following.exit_code == EXIT_STOPPED:
                        _say(self._where.continue_later(self._paths, self._stage, past))
                    return following.exit_code
                _say(
                    f"attempt {attempt.number} ended with exit code {attempt.exit_code}; "
                    f"the next one resumes where it stood{_with_less(following)}"
                )
                batch = following
        finally:
            self._flag.unlink(missing_ok=True)  # so that a job run by hand does not stop at once

    def _send_left(self) -> None:
        """Send what trackers could not, unless whoever stops this job waits for its end."""
        if self._is_stopping:
            return
        ended = endings(ledger.read(self._paths.ledger_dir, max_steps=1))
        parts = {part_name(*place): Ending(exit_code=end[0], error=end[1]) for place, end in ended.items() if end}
        for outcome in send_at_end(self._paths.tracking_dir, parts):
            _say(f"{outcome.what}: {outcome.problem or 'sent to where the run is tracked'}")

    def _after(self, attempt: Attempt) -> Batch | None | Stop:
        """Return the batch of the next attempt, or why there is none."""
        following = next_batch(attempt, self._stage.settings)
        if isinstance(following, Stop):
            return following
        if self._is_stopping:
            return Stop(exit_code=EXIT_STOPPED, reason="stopped")
        try:  # it must not fence off the attempt that has replaced this one, nor start ranks in its place
            ledger.check_fence(self._paths.ledger_dir, self._stage.name, self._task, attempt.number)
        except SousbatchError as error:
            return Stop(exit_code=1, reason=str(error))
        lost = self._where.why_lost()
        return Stop(exit_code=1, reason=lost) if lost else following

    def _on_stop(self, number: int, _: FrameType | None) -> None:
        self._is_stopping = True
        is_flagged = self._kind.stopped_by == "flag"  # the others are short and safe to restart
        try:
            ledger.check_fence(self._paths.ledger_dir, self._stage.name, self._task, self._number)
            self._flag.touch()
        except (OSError, FencedError):  # on a full disk the ranks cannot be asked; those of a newer attempt must not
            is_flagged = False
        if not is_flagged:
            for process in self._running:
                process.terminate()

    def _attempt(self, batch: Batch | None) -> Attempt:
        writer = ledger.open_attempt(self._paths.ledger_dir, self._stage.name, self._task)
        self._number = writer.number
        if not self._is_stopping:  # ranks that were ended because another had failed raised it
            self._flag.unlink(missing_ok=True)
        writer.write(
            Started(
                job=self._where.job_id or None,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=__version__,
                python=platform.python_version(),
                micro_batch=batch.micro_batch if batch else None,
                accumulation=batch.accumulation if batch else None,
                fallbacks=",".join(batch.fallbacks) or None if batch else None,
            )
        )
        _say(f"attempt {writer.number} of {self._stage.name} on {socket.gethostname()}")
        try:
            verify(self._paths, self._plan, self._stage, is_point=self._given.sweep is not None)
            if self._kind.leaves == "checkpoints":  # no training starts whose final weights are not held for it
                reserve(self._plan, self._paths)
            begins = os.fstat(1).st_size
            code = self._run_job(writer.number, batch)
            code = self._explained(code, begins, writer)
        except Exception as error:  # an attempt always ends with a record
            code = EXIT_NO_ROOM if is_no_room(error) else 1
            event = Error.of_exception(error)
            _say(event.message)
            writer.write(event)
        events = ledger.read(self._paths.ledger_dir, max_steps=1)
        code = _worst([code, *rank_codes(events, self._stage.name, self._task, writer.number)]) if code else 0
        mine = [a for a in read_attempts(events, self._stage.name, self._task, batch) if a.number == writer.number]
        progress = mine[0].progress if mine else 0
        writer.write(Ended(exit_code=code, progress=progress))
        writer.close()
        return Attempt(number=writer.number, batch=batch, exit_code=code, progress=progress)

    def _explained(self, code: int, begins: int, writer: ledger.Ledger) -> int:
        """Return the exit code of the ranks, and record the error that they did not."""
        events = ledger.read(self._paths.ledger_dir, max_steps=1)
        is_over = is_finished(events, self._stage.name, self._task, writer.number)
        log = "" if is_over or code == EXIT_STOPPED else _log_since(begins)
        code, message = self._where.explain(self._stage, code, log, is_finished=is_over)
        if message:
            writer.write(Error(message=message))
        return code

    def _run_job(self, attempt: int, batch: Batch | None) -> int:
        given = replace(self._given, attempt=attempt, stop_flag=str(self._flag))
        if batch is not None:
            fallbacks = ",".join(batch.fallbacks) or None
            given = replace(given, micro_batch=batch.micro_batch, accumulation=batch.accumulation, fallbacks=fallbacks)
        self._running = []
        for command in self._where.commands(self._plan, self._paths, self._stage):
            own = processes.child_environment(os.environ | given.to_env() | command.variables)
            self._running.append(subprocess.Popen(command.words, env=own, stdin=subprocess.DEVNULL))
        if self._is_stopping:
            self._on_stop(signal.SIGTERM, None)
        code = _worst(self._wait())
        processes.end_descendants(grace_s=2)
        with suppress(OSError, KeyError):  # not empty, so in use; or a user without a name
            (Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}").rmdir()  # torch makes it when imported
        return EXIT_STOPPED if self._is_stopping and code == 128 + signal.SIGTERM else code

    def _wait(self) -> list[int]:
        """Wait for all nodes.

        Once one has failed, the others get a while and are then ended.

        When the job's own process is gone nobody holds the devices for these ranks any more:
        all is ended at once, before another job can start on them.
        """
        failed_at: float | None = None
        while None in (codes := [process.poll() for process in self._running]):
            if self._parent not in (None, os.getppid()):
                self._is_stopping = True
                processes.end_descendants(grace_s=0)
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _STRAGGLER_S:
                processes.end_descendants(grace_s=5)
            time.sleep(_POLL_S)
        return [process.returncode for process in self._running]


def _with_less(batch: Batch | None) -> str:
    """Say with which sizes a training continues."""
    if batch is None:
        return ""
    words = [f"micro batch {batch.micro_batch} x {batch.accumulation}", *batch.fallbacks]
    return f", with {', '.join(words)}"


def _worst(codes: Sequence[int]) -> int:
    """Return the one code that explains an attempt.

    What a rank said wins over how others died of it.
    """
    for clear in (EXIT_NO_ROOM, EXIT_DEVICE_MEMORY, EXIT_DIVERGED):
        if clear in codes:
            return clear
    others = [code for code in codes if code not in (0, EXIT_STOPPED)]
    if others:
        return others[0] if others[0] > 0 else 128 - others[0]
    return EXIT_STOPPED if EXIT_STOPPED in codes else 0


def _log_since(begins: int) -> str:
    """Return the end of this process's own log, from byte *begins* on.

    It is empty where the log cannot be read again.
    """
    try:
        with open("/proc/self/fd/1", "rb") as log:
            log.seek(max(begins, os.fstat(1).st_size - _LOG_END_BYTES))
            return log.read().decode(errors="replace")
    except OSError:
        return ""


def _say(text: str) -> None:
    """Print a line to the log, unless there is nothing to say."""
    if not text:
        return
    with suppress(OSError):  # the log may lie on a full disk, and Python would keep what it could not print
        os.write(1, f"sousbatch: {text}\n".encode(errors="replace"))


def main(run: str, stage: str) -> int:
    """Run this task of *stage* of the run in folder *run*; return its exit code."""
    parent = os.getppid() if processes.die_with_parent(signal.SIGTERM) else None
    processes.adopt_orphans()
    paths = RunPaths(root=Path(run))
    try:
        with no_room_named(f"the ledger of {paths.root}"):
            plan, given = read_plan(paths.plan), JobEnvironment.from_env(os.environ)
            codes = []
            where = launcher_named(plan.site.launcher).placement(given)
            for task in where.tasks(plan, plan.stage(stage)):
                mine = replace(given, task=task)
                codes.append(_Task(paths, plan, plan.stage(stage), mine, where, parent).run())
                if codes[-1] == EXIT_STOPPED:  # the request to stop is for all that this process has to do
                    break
            return _worst(codes)
    except SousbatchError as error:
        _say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
