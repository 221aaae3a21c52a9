"""Launch jobs on Slurm: sbatch sends, squeue and sacct answer.

A job's comment holds the key under which it was sent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from ... import files
from ...cluster import slurm, slurm_site
from ...cluster.environment import SLURM_CLIENT_NAMES, handed_on
from ...cluster.site import Site
from ...cluster.slurm import JobRow
from ...errors import EXIT_STOPPED, SlurmError, UnreachableError
from ...job_environment import JobEnvironment, variable
from ...recipes.plan import Plan, Stage
from ...run_folder import RunPaths
from ...user_folders import state_dir
from ..base import JobRef, JobState, Placement, Request, StateWord, how_ended, script
from ..local.placement import LocalPlacement
from .placement import SlurmPlacement
from .script import array_size, header

_NO_NODE_NOW = "Requested node configuration is not available"
CLIENT_LINE = f"unset {' '.join(SLURM_CLIENT_NAMES)}  # sbatch's own: the node has others"
TASK_LINE = f'export {variable("task")}="${{SLURM_ARRAY_TASK_ID:-0}}"'
PATIENCE_S = 60.0
_SETTLING_S = (1.0, 3.0, 6.0)
_ASKED = (signal.SIGUSR1, signal.SIGTERM)  # what asks a batch shell to stop; it may not listen yet
_STOPPED = (EXIT_STOPPED, *(128 + number for number in _ASKED))

# Every state of Slurm 20.11 to 25.05 (squeue(1), JOB STATE CODES); what is not here is shown by its own name.
STATES: dict[str, StateWord] = {
    "PENDING": "waiting",
    "CONFIGURING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_FED": "waiting",
    "REQUEUE_HOLD": "waiting",
    "RESV_DEL_HOLD": "waiting",
    "SPECIAL_EXIT": "waiting",
    "SUSPENDED": "waiting",
    "STOPPED": "waiting",
    "RUNNING": "running",
    "COMPLETING": "running",  # not over: its processes may still write
    "RESIZING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "EXPEDITING": "waiting",
    "POWER_UP_NODE": "waiting",
    "UPDATE_DB": "running",
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "PREEMPTED": "stopped",
    "FAILED": "failed",
    "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
    "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "TIMEOUT": "failed",
    "LAUNCH_FAILED": "failed",
    "RECONFIG_FAIL": "failed",
}
_FALLBACK: StateWord = "waiting"  # never final, so that nothing is sent twice
_ENDS = {
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline passed",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it took more host memory than it asked for: raise resources.memory_gb",
    "PREEMPTED": "a job of higher priority took its place",
    "TIMEOUT": "the time limit ended it before it could save: raise resources.time_min",
}
# The reasons that people meet (squeue(1), JOB REASON CODES); others are shown by Slurm's own name.
_REASONS = {
    "None": "",
    "Priority": "jobs of higher priority go first",
    "Resources": "waits for free nodes",
    "Dependency": "waits for an earlier stage",
    "DependencyNeverSatisfied": "an earlier stage did not end well",
    "BeginTime": "resumes shortly: Slurm holds back what it requeued",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is closed",
    "PartitionTimeLimit": "its time limit is above the partition's",
    "PartitionNodeLimit": "it wants more nodes than the partition gives",
    "ReqNodeNotAvail": "the nodes it asks for are down or reserved",
    "Reservation": "waits for its reservation",
    "JobArrayTaskLimit": "as many tasks run as resources.tasks_at_once allows",
    "Licenses": "waits for a licence",
    "NodeDown": "a node it needs is down",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its qos is not valid",
    "launch failed requeued held": "it failed to start and is held; `scontrol release` lets it go",
}


class SlurmLauncher:
    """Sends jobs to the Slurm of this machine.

    Who only looks gives *max_age_s*: answers may be that old, so that all who watch share one call, and nobody waits
    for a controller that does not answer.
    """

    name = "slurm"
    is_host_bound = False
    keeps_environment = True  # on the controller's disk

    def __init__(self, *, max_age_s: float | None = None) -> None:
        self._max_age_s = max_age_s
        self._seen: dict[str, JobRef] | None = None  # by key: what was there at the first sending, and sent since

    def is_here(self) -> bool:
        """Return whether this machine has Slurm's commands."""
        return shutil.which("squeue") is not None

    def read_site(self) -> Site:
        """Return what the cluster offers."""
        return slurm_site.read_site(patience_s=PATIENCE_S)

    def placement(self, given: JobEnvironment) -> Placement:
        """Return where the calling stage process runs: a job, else this machine."""
        return SlurmPlacement(self, given) if slurm.job_id() else LocalPlacement(given)

    def forget(self, beginning: str) -> None:
        """Do nothing: Slurm forgets ended jobs by itself."""

    def prepare(self, plan: Plan, paths: RunPaths) -> tuple[Request, ...]:
        """Return the requests of all stages in order. Pure."""
        return tuple(_request(plan, paths, stage) for stage in plan.stages)

    def objections(self, requests: Sequence[Request], plan: Plan, runs: Path) -> tuple[list[str], list[str]]:
        """Return why Slurm would refuse requests, and when it would start them.

        With --test-only Slurm refuses what no node could run at this moment; a job that is sent waits for nodes.
        """
        refusals, starts = [], []
        folder = next(one for one in (runs, *runs.parents) if one.is_dir())
        if re.search(r"[%\\]", str(runs)):
            refusals.append(f"Slurm takes '%' and '\\' in {str(runs)!r} for its own signs; choose a folder with --runs")
        for request in requests:
            try:
                answer = slurm.test(request.text, folder=folder, environment=handed_on(os.environ, request.inherit))
                starts.append(f"{request.stage} {answer}")
            except SlurmError as error:
                partition = plan.site.partition(request.resources.partition)
                waits = partition and _NO_NODE_NOW in str(error) and slurm_site.nodes_away(partition.name)
                if waits:
                    starts.append(f"{request.stage} would wait: {waits}")
                else:
                    refusals.append(f"stage {request.stage!r}: {error}")
        return refusals, starts

    def send(self, request: Request, key: str, after: Mapping[str, JobRef]) -> JobRef:
        """Send the job and return it; a key is accepted once.

        Where Slurm took the job but could not say so in time, it is found by its key and adopted.

        Raises:
            SlurmError: Slurm refused the job, or does not answer and has no such job.
        """
        folder = files.make_private_dir(Path(request.log_dir)).parent
        options = [f"--comment={key}", *_dependency(request, after)]
        with files.locked(_send_lock()) as lock:
            deadline = time.monotonic() + PATIENCE_S
            known = self._known_before(key)
            while not known:
                try:
                    environment = handed_on(os.environ, request.inherit)
                    job_id = slurm.submit(request.text, options, folder=folder, environment=environment, lock=lock)
                    self._forget_queue()
                    known = {key: JobRef(launcher=self.name, job_id=job_id)}
                except UnreachableError:
                    if time.monotonic() > deadline:
                        raise
                    known = self._find_late(key)
            self._seen = (self._seen or {}) | known
            return known[key]

    def _known_before(self, key: str) -> dict[str, JobRef]:
        """Return the job of *key*, among those there when this launcher first sent.

        That is one call for all stages of a run.
        """
        if self._seen is None:
            _, rows = self._queue()
            self._seen = {row.comment: JobRef(launcher=self.name, job_id=row.job_id) for row in rows}
        return {key: self._seen[key]} if key in self._seen else {}

    def _find_late(self, key: str) -> dict[str, JobRef]:
        """Look for a job that sbatch gave up on.

        The controller may still be working off what it was sent.
        """
        for pause_s in _SETTLING_S:
            time.sleep(pause_s)
            if known := self._known([key]):
                return known
        return {}

    def find(self, keys: Collection[str]) -> dict[str, JobRef]:
        """Return the jobs that Slurm accepted under *keys* and still knows.

        Who is to decide by it waits for any sbatch that outlives the client that was killed over it.
        """
        if not keys:
            return {}
        with nullcontext() if self._max_age_s is not None else files.locked(_send_lock()):
            return self._known(keys)

    def _known(self, keys: Collection[str]) -> dict[str, JobRef]:
        wanted, beginnings = set(keys), tuple(key for key in keys if key.endswith("."))
        _, rows = self._queue()
        found = [row for row in rows if row.comment in wanted or row.comment.startswith(beginnings)]
        return {row.comment: JobRef(launcher=self.name, job_id=row.job_id) for row in found}

    def states(self, refs: Collection[JobRef]) -> dict[JobRef, JobState]:
        """Return the state of each job: from the queue, else from accounting."""
        if not refs:
            return {}
        seen_at, rows = self._queue()
        by_id: dict[str, list[JobRow]] = {}
        for row in rows:
            by_id.setdefault(row.job_id, []).append(row)
        gone = {ref.job_id for ref in refs if ref.job_id not in by_id}
        for row in slurm.ended(gone) if gone else ():
            by_id.setdefault(row.job_id, []).append(row)
        return {ref: job_state(by_id.get(ref.job_id, ()), seen_at) for ref in refs}

    def cancel(self, refs: Collection[JobRef], *, save: bool) -> None:
        """Cancel jobs.

        With *save* what waits is cancelled, and what runs gets SIGUSR1 in its batch shell.
        """
        ids = [ref.job_id for ref in refs]
        if save:
            slurm.cancel(ids, "--state=PENDING")
            slurm.cancel(ids, "--state=RUNNING", "--batch", "--signal=USR1")
        else:
            slurm.cancel(ids)
        self._forget_queue()

    def _queue(self) -> tuple[float, list[JobRow]]:
        """Return when the queue was asked, and its rows.

        Callers that watch share the answer.
        """
        if self._max_age_s is None:
            return time.time(), slurm.queue(patience_s=PATIENCE_S)
        path = _queue_file()
        with files.locked(path.with_suffix(".lock")):
            try:
                asked_at = path.stat().st_mtime
                if 0 <= time.time() - asked_at < self._max_age_s:
                    return asked_at, [JobRow(**values) for values in files.read_json(path)]
            except (OSError, ValueError, TypeError):
                pass
            asked_at, rows = time.time(), slurm.queue()
            path.write_text(json.dumps([asdict(row) for row in rows]))
            return asked_at, rows

    def _forget_queue(self) -> None:
        _queue_file().unlink(missing_ok=True)


def _send_lock() -> Path:
    return files.make_private_dir(state_dir()) / "slurm-send.lock"


def _queue_file() -> Path:
    cluster = files.digest_of(os.environ.get("SLURM_CONF", ""))[:8]
    return files.make_private_dir(state_dir()) / f"slurm-queue-{cluster}.json"


def _request(plan: Plan, paths: RunPaths, stage: Stage) -> Request:
    size = array_size(stage.num_tasks, len(plan.stages), plan.site) if stage.num_tasks > 1 else None
    lines = header(
        f"{plan.recipe.name}.{stage.name}",
        str(paths.log(stage.name, "%5a" if size else 0).relative_to(paths.root)),
        stage.resources,
        plan.site,
        uses_devices=stage.uses_devices,
        ranks_per_node=stage.ranks_per_node,
        array_size=size,
    )
    return Request(
        stage=stage.name,
        text=script(plan, paths, stage, [*lines, *_ranks(stage), CLIENT_LINE, TASK_LINE]),
        num_tasks=stage.num_tasks,
        after=stage.after,
        resources=stage.resources,
        uses_devices=stage.uses_devices,
        log_dir=str(paths.log_dir),
        inherit=plan.recipe.environment.inherit,
    )


def _ranks(stage: Stage) -> list[str]:
    """Return comment lines that say how the stage process runs the ranks."""
    if stage.record.looks_after_itself:
        return ["# The stage process below runs all stages of a point, one after another, each with srun."]
    nodes = stage.resources.nodes if stage.uses_devices else 1
    command = slurm.srun([], nodes=nodes, tasks_per_node=stage.ranks_per_node, cpus_per_task=stage.cpus_per_rank)
    return [f"# The stage process below runs the ranks: {' '.join(command)} python -m {stage.record.module}"]


def _dependency(request: Request, after: Mapping[str, JobRef]) -> Iterable[str]:
    words = {"ok": "afterok", "any": "afterany"}
    found = [f"{words[item.condition]}:{after[item.stage].job_id}" for item in request.after if item.stage in after]
    return [f"--dependency={','.join(found)}"] if found else []


def job_state(rows: Sequence[JobRow], seen_at: float) -> JobState:
    """Return the state of a job, or of an array as a whole, from its rows. Pure."""
    if not rows:
        return JobState(word="lost", reason="Slurm does not know the job any more", seen_at=seen_at)
    words = [(_word(row), row) for row in rows]
    for word in ("running", "waiting", "failed", "stopped", "cancelled", "done"):
        for found, row in words:
            if found == word:
                return JobState(word=found, reason=_reason(found, row), seen_at=seen_at)
    raise AssertionError("a row has one of the words above")


def _word(row: JobRow) -> StateWord:
    status = row.exit_status
    if row.state == "FAILED" and status is not None and (status >> 8 in _STOPPED or status & 0x7F in _ASKED):
        return "stopped"
    return STATES.get(row.state, _FALLBACK)


def _reason(word: StateWord, row: JobRow) -> str:
    """Return in words why a job waits, or how it ended."""
    if row.state not in STATES:
        return f"Slurm says {row.state}"
    if word == "waiting":
        reason = _REASONS.get(row.reason, f"Slurm says {row.reason}")
        return f"{reason}, expected to start {row.start.replace('T', ' ')}" if row.start and reason else reason
    if word == "cancelled":  # the reason is the last one that it waited for, and says why only in this case
        return _REASONS[row.reason] if row.reason == "DependencyNeverSatisfied" else "cancelled"
    if row.state in _ENDS:
        return _ENDS[row.state]
    if word == "stopped":
        return "stopped after saving"
    if word != "failed":
        return ""
    if row.exit_status is None:
        return f"task {row.task or 0} failed; Slurm's exit status {row.exit_text!r} is of no form known here"
    code, number = row.exit_status >> 8, row.exit_status & 0x7F
    if number > 31:  # no signal, but Slurm's own error number
        how = f"was not started by Slurm ({row.reason}); ask `scontrol show job {row.job_id}`"
    elif number:
        how = how_ended(-number)
    else:
        how = how_ended(code)
    return f"task {row.task or 0} {how}"
