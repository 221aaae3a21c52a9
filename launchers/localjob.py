"""The process of one local job: `python -m sousbatch.launchers.localjob FOLDER LOCK`.

It waits for the jobs it depends on, runs its tasks, and records the end. Whatever its
descendants do, none outlives it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from .. import files
from ..cluster import processes
from ..errors import EXIT_DEVICE_MEMORY, EXIT_NO_ROOM, EXIT_STOPPED
from .base import FINAL_WORDS, JobState, how_ended
from .local import POLL_S, job_state, write_end

_GRACE_S = 5.0
_MEANING = {EXIT_NO_ROOM: "found no room left on the store", EXIT_DEVICE_MEMORY: "ran out of device memory"}
# A task that was asked to stop before it could listen, or while the recipe's set-up lines ran.
_DIED_OF_ASKING = (-signal.SIGTERM, 128 + signal.SIGTERM)


class _Job:
    """One local job; *folder* holds what `send` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec: dict[str, Any] = files.read_json(folder / "job.json")
        self._stop: Literal["save", "now"] | None = None
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._slots: dict[int, int] = {}
        self._asked: set[int] = set()
        self._codes: dict[int, int] = {}

    def run(self) -> int:
        """Run the job and return 0 when it is done."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        processes.adopt_orphans()
        (self._folder / "pid").touch()
        with suppress(OSError):  # for people; that it exists is what counts
            (self._folder / "pid").write_text(f"{os.getpid()}\n")
        try:
            end = self._wait_for_jobs() or self._work()
        except Exception as error:  # a job always ends with a record
            self._stop = "now"
            with suppress(OSError):
                traceback.print_exc()
            end = JobState(word="failed", reason=f"{type(error).__name__}: {error}")
        processes.end_descendants(grace_s=0 if self._stop == "now" else _GRACE_S)
        write_end(self._folder, end)
        return 0 if end.word == "done" else 1

    def _on_sigterm(self, *_: object) -> None:
        self._stop = self._stop or "save"

    def _is_stopping(self) -> bool:
        """Look whether someone asked the job to end."""
        if (self._folder / "cancel-now").exists():
            self._stop = "now"
        elif (self._folder / "cancel-save").exists():
            self._stop = self._stop or "save"
        return self._stop is not None

    def _wait_for_jobs(self) -> JobState | None:
        """Return None when every dependency is met, else how the job ends without a start."""
        for item in self._spec["after"]:
            while (state := job_state(self._folder.parent / item["job"])).word not in FINAL_WORDS:
                if self._is_stopping():
                    return JobState(word="cancelled", reason="cancelled while waiting")
                time.sleep(POLL_S)
            if item["condition"] == "ok" and state.word != "done":
                return JobState(word="cancelled", reason=f"{item['stage']} is {state.word}")
        return None

    def _work(self) -> JobState:
        with self._machine():
            if self._is_stopping():
                return JobState(word="cancelled", reason="cancelled while waiting")
            (self._folder / "started").touch()
            (self._folder / "queued").unlink(missing_ok=True)
            self._run_tasks()
        return self._outcome()

    def _machine(self) -> IO[str]:
        """Wait until no other job of this user uses the machine; the returned file holds the claim."""
        # by host: the state folder may lie in a home that several machines share
        lock = (self._folder.parent / f"machine-{socket.gethostname()}.lock").open("a")
        while self._spec["uses_devices"] and not self._is_stopping():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                (self._folder / "queued").touch()
                time.sleep(POLL_S)
        return lock

    def _run_tasks(self) -> None:
        waiting = list(range(self._spec["num_tasks"]))
        while waiting or self._running:
            if self._is_stopping():
                waiting.clear()
                self._pass_on()
            while waiting and len(self._running) < self._spec["parallel"]:
                self._start(waiting.pop(0))
            for task, process in list(self._running.items()):
                if process.poll() is not None:
                    asked = task in self._asked and process.returncode in _DIED_OF_ASKING
                    self._codes[task] = EXIT_STOPPED if asked else process.returncode
                    del self._running[task]
            time.sleep(POLL_S if self._running else 0)

    def _start(self, task: int) -> None:
        log_dir = files.make_private_dir(Path(self._spec["log_dir"]))
        taken = {self._slots[other] for other in self._running}
        self._slots[task] = min(set(range(self._spec["parallel"])) - taken)
        environment = os.environ | {
            "SOUSBATCH_TASK": str(task),
            "SOUSBATCH_SLOT": str(self._slots[task]),
            "SOUSBATCH_JOB": self._folder.name,
        }
        with (log_dir / f"{self._spec['stage']}-{task:05d}.log").open("a") as log:
            self._running[task] = subprocess.Popen(
                ["/bin/bash", str(self._folder / "script.sh")],
                env=processes.child_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _pass_on(self) -> None:
        """Hand the wish to stop to the tasks: once as SIGTERM, or at once as SIGKILL to all."""
        if self._stop == "now":
            processes.end_descendants(grace_s=0)
            return
        for task in self._running.keys() - self._asked:
            self._running[task].send_signal(signal.SIGTERM)
            self._asked.add(task)

    def _outcome(self) -> JobState:
        if self._stop == "now":
            return JobState(word="cancelled", reason="cancelled")
        failed = [(task, code) for task, code in sorted(self._codes.items()) if code not in (0, EXIT_STOPPED)]
        if failed:
            task, code = failed[0]
            return JobState(word="failed", reason=f"task {task} {_MEANING.get(code) or how_ended(code)}")
        if len(self._codes) < self._spec["num_tasks"] or EXIT_STOPPED in self._codes.values():
            return JobState(word="stopped", reason="stopped after saving")
        return JobState(word="done")


def main(folder: str, lock: str) -> int:
    """Run the job of *folder*; *lock* is the descriptor that holds its lock, inherited from the sender."""
    os.set_inheritable(int(lock), False)
    return _Job(Path(folder)).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
