"""The launcher for this machine: each job is a detached process that waits, runs its tasks, ends.

A job lives in a folder of the user's state folder. Its process holds the folder's lock as
long as it lives, so a held lock is a living job, on this machine, whatever was killed. What
that process does is in `localjob.py`.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from .. import files
from ..cluster.site import this_machine
from ..recipes.plan import Plan
from ..recipes.schema import Resources
from ..rundir import RunPaths, state_dir
from .base import FINAL_WORDS, JobRef, JobState, Request, script

POLL_S = 0.1
_LEAKING = ("SLURM_", "SBATCH_", "PMI_", "PMIX_", "SOUSBATCH_TASK", "SOUSBATCH_ATTEMPT")


class LocalLauncher:
    """Runs jobs on this machine."""

    name = "local"

    def __init__(self, jobs_dir: Path | None = None) -> None:
        self._jobs_dir = jobs_dir or state_dir() / "jobs"

    def prepare(self, plan: Plan, paths: RunPaths) -> tuple[Request, ...]:
        """Return the requests of all stages in order. Pure."""
        return tuple(
            Request(
                stage=stage.name,
                text=script(plan, paths, stage),
                num_tasks=stage.num_tasks,
                after=stage.after,
                resources=stage.resources,
                uses_devices=stage.kind in ("train", "predict"),
                log_dir=str(paths.log(stage.name, 0).parent),
            )
            for stage in plan.stages
        )

    def send(self, request: Request, key: str, after: Mapping[str, JobRef]) -> JobRef:
        """Start the job's process; its folder is named by *key*, so a key is accepted once."""
        folder = files.make_private_dir(self._jobs_dir) / key
        conditions = [
            {"job": after[item.stage].job_id, "condition": item.condition}
            for item in request.after
            if item.stage in after
        ]
        job = {
            "stage": request.stage,
            "text": request.text,
            "num_tasks": request.num_tasks,
            "after": conditions,
            "parallel": _parallel(request.resources),
            "uses_devices": request.uses_devices,
            "log_dir": request.log_dir,
        }
        if not folder.exists():
            temporary = files.make_private_dir(files.temporary_path(folder))
            files.write_json(temporary / "job.json", job)
            temporary.rename(folder)
        self._start(folder)
        return JobRef(launcher=self.name, job_id=key)

    def _start(self, folder: Path) -> None:
        """Start the process of a job that has none; it inherits the lock that is taken here."""
        with (folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if (folder / "started").exists():
                return
            environment = {name: value for name, value in os.environ.items() if not name.startswith(_LEAKING)}
            subprocess.Popen(
                [sys.executable, "-m", "sousbatch.launchers.localjob", str(folder), str(lock.fileno())],
                env=environment | {"PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=(folder / "output").open("a"),
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )

    def find(self, keys: Collection[str]) -> dict[str, JobRef]:
        """Return the jobs accepted under *keys*; one whose process was never started is started."""
        found = {}
        for key in keys:
            if (self._jobs_dir / key / "job.json").is_file():
                self._start(self._jobs_dir / key)
                found[key] = JobRef(launcher=self.name, job_id=key)
        return found

    def states(self, refs: Collection[JobRef]) -> dict[JobRef, JobState]:
        """Return the state of each job from its folder and its lock."""
        return {ref: job_state(self._jobs_dir / ref.job_id) for ref in refs}

    def cancel(self, refs: Collection[JobRef], *, save: bool) -> None:
        """Ask the jobs' processes to end; last ones first, so that none starts what follows."""
        for ref in reversed(list(refs)):
            folder = self._jobs_dir / ref.job_id
            if job_state(folder).word not in FINAL_WORDS:
                files.write_text(folder / "cancel", "save" if save else "now")

    def wait(self, refs: Collection[JobRef]) -> None:
        """Return when all jobs have ended."""
        while any(state.word not in FINAL_WORDS for state in self.states(refs).values()):
            time.sleep(POLL_S)


def job_state(folder: Path) -> JobState:
    """Return a job's state: its lock first, then what it wrote at its end."""
    if not (folder / "job.json").is_file():
        return JobState(word="lost", reason="this machine does not know the job")
    if _is_locked(folder / "lock"):
        return JobState(word="running" if (folder / "started").exists() else "waiting", reason=_note(folder))
    try:
        end = files.read_json(folder / "end.json")
    except FileNotFoundError:
        return JobState(word="lost", reason="its process was killed")
    return JobState(word=end["word"], reason=end["reason"])


def _note(folder: Path) -> str:
    try:
        return (folder / "note").read_text()
    except FileNotFoundError:
        return ""


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _parallel(resources: Resources) -> int:
    """Return how many tasks of a job this machine runs at once."""
    if resources.device == "gpu":
        return max(1, this_machine().gpus_per_node // resources.devices_per_node)
    return max(1, len(os.sched_getaffinity(0)) // resources.cpus_per_device)
