"""Run a local job: `python -m sousbatch.launchers.local.job_process FOLDER LOCK`.

It waits for the jobs it depends on, runs its tasks, and records the end. None of
its descendants outlives it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ... import files
from ...cluster import processes
from ...errors import EXIT_STOPPED
from ...job_environment import JobEnvironment
from ...run_folder import RunPaths
from ..base import FINAL_WORDS, JobState, how_ended, notice_s
from .launcher import POLL_S, job_state, write_end
from .machine import Share
from .queue import Line

_GRACE_S = 5.0
_KILL_WAIT_S = 30.0  # beyond the time limit, for one that is saving: Slurm's own KillWait
_LOOK_S = 1.0  # between looks at the line when nobody has changed it: a kill changes nothing
_AWAY_S = 30.0  # how long a run folder may be elsewhere
# A task that was asked to stop before it could listen, or while the recipe's set-up lines ran.
_DIED_OF_ASKING = (-signal.SIGTERM, 128 + signal.SIGTERM)


class _Job:
    """One local job; *folder* holds what `send` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec: dict[str, Any] = files.read_json(folder / "job.json")
        self._stop: Literal["save", "now"] | None = None
        self._line = Line(folder.parent, folder.name)
        self._run_dir = Path(self._spec["log_dir"]).parent
        self._held_dir = -1
        self._away_since: float | None = None
        self._has_lost_folder = False
        self._waiting = list(range(self._spec["num_tasks"]))
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._shares: dict[int, Share] = {}
        self._looked, self._why = (0, 0.0), ""
        self._asked: set[int] = set()
        self._late: set[int] = set()
        self._began: dict[int, float] = {}
        self._codes: dict[int, int] = {}

    def run(self) -> int:
        """Run the job and return 0 when it is done."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        processes.adopt_orphans()
        (self._folder / "pid").touch()
        with suppress(OSError):  # for people; that it exists is what counts
            (self._folder / "pid").write_text(f"{os.getpid()}\n")
        try:
            files.make_private_dir(Path(self._spec["log_dir"]))
            self._held_dir = os.open(self._run_dir, os.O_PATH)
            end = self._wait_for_jobs() or self._work()
        except Exception as error:  # a job always ends with a record
            self._stop = "now"
            with suppress(OSError):
                traceback.print_exc()
            end = JobState(word="failed", reason=f"{type(error).__name__}: {error}")
        processes.end_descendants(grace_s=0 if self._stop == "now" else _GRACE_S)
        write_end(self._folder, end)
        self._line.leave()
        return 0 if end.word == "done" else 1

    def _on_sigterm(self, *_: object) -> None:
        self._stop = self._stop or "save"

    def _is_stopping(self) -> bool:
        """Return whether someone asked the job to end, or removed its run folder."""
        self._has_lost_folder = self._has_lost_folder or self._is_folder_gone()
        if self._has_lost_folder or (self._folder / "cancel-now").exists():
            self._stop = "now"
        elif (self._folder / "cancel-save").exists():
            self._stop = self._stop or "save"
        return self._stop is not None

    def _wait_for_jobs(self) -> JobState | None:
        """Return None when every dependency is met.

        Otherwise return how the job ends without a start.
        """
        for item in self._spec["after"]:
            while (state := job_state(self._folder.parent / item["job"])).word not in FINAL_WORDS:
                if self._is_stopping():
                    return self._outcome()
                time.sleep(POLL_S)
            if item["condition"] == "ok" and state.word != "done":
                return JobState(word="cancelled", reason=f"{item['stage']} is {state.word}")
        return None

    def _is_folder_gone(self) -> bool:
        """Return whether the run folder was deleted, or has been elsewhere for long.

        A job whose folder comes back in time continues.
        """
        try:
            is_here = os.path.samestat(self._run_dir.stat(), os.fstat(self._held_dir))
        except OSError:
            is_here = False
        if is_here:
            self._away_since = None
            return False
        self._away_since = self._away_since or time.monotonic()
        with suppress(OSError):  # else another host deleted it (ESTALE)
            if os.fstat(self._held_dir).st_nlink:
                return time.monotonic() - self._away_since > _AWAY_S
        return True

    def _work(self) -> JobState:
        wanted, seen = self._spec["num_devices"], len(self._spec["device_names"])
        if wanted > seen:
            reason = f"it asks for {wanted} GPUs and this machine shows {seen}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
            return JobState(word="failed", reason=reason)
        while self._waiting or self._running:
            if self._is_stopping():
                self._pass_on()
            else:
                self._start_what_fits()
            self._end_late_ones()
            self._reap()
            time.sleep(POLL_S if self._running or self._waiting else 0)
        return self._outcome()

    def _start_what_fits(self) -> None:
        """Start the tasks that fit on the machine now; note why the first one waits."""
        wants = min(len(self._waiting), self._spec["at_once"] - len(self._running))
        look = (self._line.changed_at(), time.monotonic())
        if wants <= 0 or self._away_since or (look[0] == self._looked[0] and look[1] - self._looked[1] < _LOOK_S):
            return
        shares, why = self._line.settle(wants, self._shares.values())
        self._looked = look
        for share in shares:
            self._start(self._waiting.pop(0), share)
        if why != self._why and not self._codes:
            self._why = why
            with suppress(OSError):  # for people
                files.write_text(self._folder / "queued", why)

    def _reap(self) -> None:
        """Take the codes of the tasks that have ended, and give back what they had."""
        ended = [task for task, process in self._running.items() if process.poll() is not None]
        for task in ended:
            code = self._running.pop(task).returncode
            self._codes[task] = EXIT_STOPPED if task in self._asked and code in _DIED_OF_ASKING else code
            del self._shares[task]
        if ended and self._running and not self._waiting:  # the last one's goes with the job, so that no other
            self._line.settle(0, self._shares.values())  # slips in before what waits for this job
        if ended:
            self._looked = (0, 0.0)

    def _start(self, task: int, share: Share) -> None:
        path = RunPaths(root=self._run_dir).log(self._spec["stage"], task)
        files.make_private_dir(path.parent)
        (self._folder / "started").touch()
        names = self._spec["device_names"]
        devices = ",".join(names[key] for key in share.devices)
        given = JobEnvironment(task=task, devices=devices, job=self._folder.name)
        with path.open("a") as log:
            self._running[task] = subprocess.Popen(
                ["/bin/bash", str(self._folder / "script.sh")],
                env=processes.child_environment(os.environ | given.to_env()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._shares[task] = share
        self._began[task] = time.monotonic()

    def _end_late_ones(self) -> None:
        """Ask tasks to save and stop before their time limit, and end them at it.

        Slurm does the same.
        """
        minutes = self._spec.get("time_min")
        if minutes is None:
            return
        for task, process in self._running.items():
            left_s = minutes * 60 - (time.monotonic() - self._began[task])
            if left_s < notice_s(minutes) and task not in self._late:
                self._late.add(task)
                if task not in self._asked:
                    process.send_signal(signal.SIGTERM)
                    self._asked.add(task)
            if left_s < -min(_KILL_WAIT_S, notice_s(minutes)):
                process.kill()  # its ranks die with it

    def _pass_on(self) -> None:
        """Ask the tasks to stop: once by SIGTERM, or now by SIGKILL.

        No further task starts.
        """
        if self._waiting:
            self._waiting.clear()
            self._line.settle(0, self._shares.values())
        if self._stop == "now":
            processes.end_descendants(grace_s=0)
            return
        for task in self._running.keys() - self._asked:
            self._running[task].send_signal(signal.SIGTERM)
            self._asked.add(task)

    def _late_outcome(self) -> JobState:
        limit = f"its time limit, resources.time_min={self._spec['time_min']}"
        codes = [self._codes[task] for task in self._late]
        if any(code not in (0, EXIT_STOPPED) for code in codes):
            return JobState(word="failed", reason=f"ended at {limit}, and could not stop before: raise it")
        return JobState(word="stopped", reason=f"stopped before {limit}; `resume` continues")

    def _outcome(self) -> JobState:
        if self._has_lost_folder:
            return JobState(word="failed", reason=f"its run folder {self._run_dir} was deleted or moved away")
        if not (self._folder / "started").exists():
            return JobState(word="cancelled", reason="cancelled while waiting")
        if self._stop == "now":
            return JobState(word="cancelled", reason="cancelled")
        if self._late and all(code == 0 or task in self._late for task, code in self._codes.items()):
            return self._late_outcome()
        failed = [(task, code) for task, code in sorted(self._codes.items()) if code not in (0, EXIT_STOPPED)]
        if failed:
            task, code = failed[0]
            return JobState(word="failed", reason=f"task {task} {how_ended(code)}")
        if len(self._codes) < self._spec["num_tasks"] or EXIT_STOPPED in self._codes.values():
            return JobState(word="stopped", reason="stopped after saving")
        return JobState(word="done")


def main(folder: str, lock: str) -> int:
    """Run the job of *folder*.

    *lock* is the descriptor that holds its lock, inherited from the sender.
    """
    os.set_inheritable(int(lock), False)
    return _Job(Path(folder)).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
