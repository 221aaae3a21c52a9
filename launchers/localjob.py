"""The process of one local job: `python -m sousbatch.launchers.localjob FOLDER LOCK`.

It waits for the jobs it depends on, runs its tasks, and leaves `end.json`. Whatever its
descendants do, none outlives it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Literal

from .. import files
from ..cluster import processes
from ..errors import EXIT_STOPPED
from .base import FINAL_WORDS, StateWord
from .local import POLL_S, job_state

_GRACE_S = 5.0


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
        signal.signal(signal.SIGTERM, lambda *_: self._ask_to_stop("save"))
        processes.adopt_orphans()
        word, reason = self._wait_for_jobs()
        if word == "running":
            with self._machine():
                if self._stop is None:
                    (self._folder / "started").touch()
                    self._run_tasks()
            processes.end_descendants(grace_s=0 if self._stop == "now" else _GRACE_S)
            word, reason = self._outcome()
        files.write_json(self._folder / "end.json", {"word": word, "reason": reason})
        return 0 if word == "done" else 1

    def _ask_to_stop(self, how: Literal["save", "now"]) -> None:
        self._stop = how

    def _look_for_cancel(self) -> None:
        try:
            how = (self._folder / "cancel").read_text()
        except FileNotFoundError:
            return
        self._stop = "now" if how == "now" else "save"

    def _wait_for_jobs(self) -> tuple[StateWord, str]:
        """Return "running" when every dependency is met, else why the job never starts."""
        for item in self._spec["after"]:
            while (state := job_state(self._folder.parent / item["job"])).word not in FINAL_WORDS:
                self._look_for_cancel()
                if self._stop:
                    return "cancelled", "cancelled while waiting"
                time.sleep(POLL_S)
            if item["condition"] == "ok" and state.word != "done":
                return "cancelled", f"{item['job'].rsplit('.', 2)[-2]} is {state.word}"
        return "running", ""

    def _machine(self) -> IO[str]:
        """Wait until no other job on this machine uses its devices; the returned file holds the claim."""
        lock = (self._folder.parent / "machine.lock").open("a")
        while self._spec["uses_devices"] and self._stop is None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                (self._folder / "note").write_text("another run uses this machine")
                self._look_for_cancel()
                time.sleep(POLL_S)
        return lock

    def _run_tasks(self) -> None:
        (self._folder / "note").unlink(missing_ok=True)
        waiting = list(range(self._spec["num_tasks"]))
        while waiting or self._running:
            while waiting and len(self._running) < self._spec["parallel"] and self._stop is None:
                self._start(waiting.pop(0))
            self._look_for_cancel()
            if self._stop:
                waiting.clear()
                self._pass_on()
            for task, process in list(self._running.items()):
                if process.poll() is not None:
                    self._codes[task] = process.returncode
                    del self._running[task]
            time.sleep(POLL_S)

    def _start(self, task: int) -> None:
        log_dir = files.make_private_dir(Path(self._spec["log_dir"]))
        text = self._folder / "script.sh"
        text.write_text(self._spec["text"])
        slot = self._slots[task] = min(
            set(range(self._spec["parallel"])) - {self._slots[other] for other in self._running}
        )
        environment = os.environ | {
            "SOUSBATCH_TASK": str(task),
            "SOUSBATCH_SLOT": str(slot),
            "SOUSBATCH_JOB": self._folder.name,
        }
        with (log_dir / f"{self._spec['stage']}-{task:05d}.log").open("a") as log:
            self._running[task] = subprocess.Popen(
                ["/bin/bash", str(text)],
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

    def _outcome(self) -> tuple[StateWord, str]:
        if self._stop == "now":
            return "cancelled", "cancelled"
        worst = [(task, code) for task, code in sorted(self._codes.items()) if code not in (0, EXIT_STOPPED)]
        if worst:
            task, code = worst[0]
            return (
                "failed",
                f"task {task} ended with exit code {code}" if code > 0 else f"task {task} was killed by signal {-code}",
            )
        if len(self._codes) < self._spec["num_tasks"] or EXIT_STOPPED in self._codes.values():
            return "stopped", "stopped after saving"
        return "done", ""


def main(folder: str, lock: str) -> int:
    """Run the job of *folder*; *lock* is the descriptor that holds its lock, inherited from the sender."""
    os.set_inheritable(int(lock), False)
    return _Job(Path(folder)).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
