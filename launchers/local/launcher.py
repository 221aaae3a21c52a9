"""Launch jobs on this machine, each as a detached process.

A job lives in a folder of the user's state folder. Its process holds the folder's lock as
long as it lives, so a held lock is a living job of this machine, also after a kill.
`job_process.py` has the code of that process.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from ... import files
from ...cluster import site
from ...cluster.environment import without_leaks
from ...job_environment import JobEnvironment
from ...recipes.plan import Plan
from ...run_folder import RunPaths
from ...user_folders import state_dir
from ..base import FINAL_WORDS, JobRef, JobState, Request, StateWord, script
from .machine import Need, Share
from .placement import LocalPlacement
from .queue import Form, Line

POLL_S = 0.1
_END_BYTES = 4096
_END_CHARACTERS = 300  # at most 12 bytes each as JSON


class LocalLauncher:
    """Runs jobs on this machine."""

    name = "local"
    is_host_bound = True
    keeps_environment = False

    def __init__(self, jobs_dir: Path | None = None, *, max_age_s: float | None = None) -> None:
        self._jobs_dir = jobs_dir or state_dir() / "jobs"
        self._gpus: tuple[site.Gpu, ...] | None = None

    def is_here(self) -> bool:
        """Return whether its jobs can be asked about from this machine: always."""
        return True

    def read_site(self) -> site.Site:
        """Return what this machine offers."""
        return site.this_machine()

    def objections(self, requests: Sequence[Request], plan: Plan, runs: Path) -> tuple[list[str], list[str]]:
        """Return nothing: the plan itself says what this machine cannot do."""
        return [], []

    def placement(self, given: JobEnvironment) -> LocalPlacement:
        """Return where the stage process that calls this runs."""
        return LocalPlacement(given)

    def prepare(self, plan: Plan, paths: RunPaths) -> tuple[Request, ...]:
        """Return the requests of all stages in order. Pure."""
        return tuple(
            Request(
                stage=stage.name,
                text=script(plan, paths, stage),
                num_tasks=stage.num_tasks,
                after=stage.after,
                resources=stage.resources,
                uses_devices=stage.uses_devices,
                log_dir=str(paths.log_dir),
            )
            for stage in plan.stages
        )

    def send(self, request: Request, key: str, after: Mapping[str, JobRef]) -> JobRef:
        """Start the job's process.

        The job's folder is named by *key*, so a key is accepted once.
        """
        folder = files.make_private_dir(self._jobs_dir) / key
        if not folder.exists():
            self._write(folder, request, after)
        _start(folder, self._form(request, after))
        return JobRef(launcher=self.name, job_id=key)

    def _write(self, folder: Path, request: Request, after: Mapping[str, JobRef]) -> None:
        job = {
            "stage": request.stage,
            "num_tasks": request.num_tasks,
            "after": [
                {"job": after[item.stage].job_id, "stage": item.stage, "condition": item.condition}
                for item in request.after
                if item.stage in after
            ],
            "at_once": request.resources.tasks_at_once or request.num_tasks,
            "num_devices": _need(request).devices,
            "device_names": {gpu.key: gpu.name for gpu in self._gpus_for(request)},
            "log_dir": request.log_dir,
            "time_min": request.resources.time_min,
        }
        temporary = files.make_private_dir(files.temporary_path(folder))
        try:
            files.write_text(temporary / "script.sh", request.text)
            files.write_json(temporary / "job.json", job)
            (temporary / "end.json").write_bytes(b" " * _END_BYTES)  # so that the end can be written on a full disk
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not (folder / "job.json").is_file():  # else another client sent the same key meanwhile
                raise

    def _form(self, request: Request, after: Mapping[str, JobRef]) -> Form:
        run = Path(request.log_dir).parent
        cores = sum(1 << core for core in site.usable_cores())
        devices = tuple(gpu.key for gpu in self._gpus_for(request))
        return Form(
            run=str(run),
            who=f"{run.parent.name}/{run.name} ({request.stage})",
            after=tuple(after[item.stage].job_id for item in request.after if item.stage in after),
            is_short=not request.uses_devices,
            seen=Share(cores=cores, devices=devices, memory=site.memory_bytes()),
            need=_need(request),
            wants=min(request.num_tasks, request.resources.tasks_at_once or request.num_tasks),
        )

    def _gpus_for(self, request: Request) -> tuple[site.Gpu, ...]:
        if _need(request).devices == 0:
            return ()
        if self._gpus is None:  # nvidia-smi takes a second on some machines: once for all stages that are sent
            self._gpus = site.visible_gpus()
        return self._gpus

    def find(self, keys: Collection[str]) -> dict[str, JobRef]:
        """Return the jobs accepted under *keys*: those whose process was started."""
        folders = [self._jobs_dir / key for key in keys if not key.endswith(".")]
        beginnings = tuple(key for key in keys if key.endswith("."))
        if beginnings and self._jobs_dir.is_dir():
            folders += [self._jobs_dir / name for name in os.listdir(self._jobs_dir) if name.startswith(beginnings)]
        return {
            folder.name: JobRef(launcher=self.name, job_id=folder.name)
            for folder in folders
            if (folder / "pid").exists() or files.is_locked(folder / "lock")
        }

    def states(self, refs: Collection[JobRef]) -> dict[JobRef, JobState]:
        """Return the state of each job from its folder and its lock."""
        return {ref: job_state(self._jobs_dir / ref.job_id) for ref in refs}

    def cancel(self, refs: Collection[JobRef], *, save: bool) -> None:
        """Ask the jobs' processes to end, the last ones first.

        In that order none starts what depends on it.
        """
        for ref in reversed(list(refs)):
            folder = self._jobs_dir / ref.job_id
            if job_state(folder).word not in FINAL_WORDS:
                (folder / ("cancel-save" if save else "cancel-now")).touch()

    def forget(self, beginning: str) -> None:
        """Remove the folders of ended jobs whose keys begin so."""
        for folder in self._jobs_dir.glob(f"{glob.escape(beginning)}*/"):
            if job_state(folder).word in FINAL_WORDS:
                files.remove_tree(folder)


def _start(folder: Path, form: Form) -> None:
    """Queue a job that never had a process, and start one.

    The process inherits the lock that is taken here.
    """
    with (folder / "lock").open("a") as lock:
        while not _try_lock(lock):  # a look at the job's state holds the lock for an instant
            if (folder / "pid").exists():
                return
            time.sleep(0.01)
        if (folder / "pid").exists():
            return
        Line(folder.parent, folder.name).enter(form)
        with (folder / "output").open("a") as output:
            subprocess.Popen(
                [sys.executable, "-m", "sousbatch.launchers.local.job_process", str(folder), str(lock.fileno())],
                env=without_leaks(os.environ) | {"PYTHONSAFEPATH": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def job_state(folder: Path) -> JobState:
    """Return a job's state: its lock first, then what it wrote at its end."""
    if not (folder / "job.json").is_file():
        return JobState(word="lost", reason="this machine does not know the job")
    if files.is_locked(folder / "lock"):
        word: StateWord = "running" if (folder / "started").exists() else "waiting"
        return JobState(word=word, reason=_why_waiting(folder) if word == "waiting" else "")
    text = (folder / "end.json").read_text()
    if not text.strip():
        return JobState(word="lost", reason="its process was killed")
    end = json.loads(text)
    return JobState(word=end["word"], reason=end["reason"])


def _why_waiting(folder: Path) -> str:
    try:
        return (folder / "queued").read_text()
    except OSError:  # it does not stand in line yet, or no longer
        return ""


def write_end(folder: Path, state: JobState) -> None:
    """Record how a job ended.

    Its process calls this once; readers look only when the process is gone.

    The bytes were reserved when the job was sent and are overwritten in their place, so that
    a full disk cannot keep a job from saying that the disk is full.
    """
    text = json.dumps({"word": state.word, "reason": state.reason[:_END_CHARACTERS]})
    with (folder / "end.json").open("r+b", buffering=0) as stream:
        stream.write(text.encode().ljust(_END_BYTES))
        os.fsync(stream.fileno())


def _need(request: Request) -> Need:
    """Return what one task needs, over all its simulated nodes."""
    wanted = request.resources
    nodes, ranks = (wanted.nodes, wanted.devices_per_node) if request.uses_devices else (1, 1)
    return Need(
        cores=nodes * ranks * wanted.cpus_per_device,
        devices=nodes * ranks if request.uses_devices and wanted.device == "gpu" else 0,
        memory=int(nodes * (wanted.memory_gb or 0) * 1e9),
    )
