"""What a stage's job does after it has saved and stopped: back into the queue, on in a new job, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ... import ledger
from ...cluster import slurm
from ...errors import SlurmError, SousbatchError, UnreachableError
from ...events import Event, Sent, of
from ...job_environment import JobEnvironment
from ...ledger_queries import is_cancelled, unsettled
from ...recipes.plan import Stage
from ...recipes.sweep import STAGE as SWEEP_STAGE
from ...run_folder import RunPaths
from ..attempts import Attempt
from ..submission import go_on
from .launcher import SlurmLauncher

MAX_IDLE = 3  # starts in a row that commit nothing before a job gives up its place in the queue


def is_idle(attempts: Sequence[Attempt]) -> bool:
    """Say whether the last starts committed nothing at all, so that another would not either."""
    tail = attempts[-MAX_IDLE:]
    return len(tail) == MAX_IDLE and not any(attempt.progress for attempt in tail)


def is_stray(events: Sequence[Event], stage: str, job_id: str) -> bool:
    """Say whether the run has another job for *stage*: this one was sent when Slurm did not answer, and came late."""
    if any(intent.stage == stage for intent in unsettled(events).values()):
        return False
    known = {event.job_id for event in of(events, Sent) if event.stage == stage}
    return bool(known) and job_id.partition("_")[0] not in known


def _is_cancelled(paths: RunPaths, stage: str, given: JobEnvironment) -> bool:
    """Say whether a person asked the newest job of *stage* to end; a point's job is that of its sweep."""
    if given.sweep is not None:
        paths, stage = RunPaths(root=paths.runs_dir), SWEEP_STAGE
    return is_cancelled(ledger.read(paths.ledger_dir, max_steps=1), stage)


def continue_job(paths: RunPaths, stage: Stage, job_id: str, attempts: Sequence[Attempt], given: JobEnvironment) -> str:
    """Let the stage go on later where somebody other than the user stopped it; return in words what was done.

    Requeued where Slurm takes it back, else continued by a new job, to which the dependants move.
    """
    if _is_cancelled(paths, stage.name, given):
        return f"cancelled; `sousbatch resume {paths.run_id}` goes on"
    if is_idle(attempts):
        return f"not requeued: {MAX_IDLE} starts in a row saved nothing new; is the time limit too short?"
    try:
        fate = slurm.fate_of(job_id)
        if fate == "gone":
            return "Slurm ends this job, or has requeued it"
        is_shared = given.sweep is not None or stage.num_tasks > 1
        if fate == "preempted" and not is_shared:
            # Since 24.05 a requeued job keeps its mark of a preemption, and ends as PREEMPTED also when all went well,
            # which kills what waits for it (job_mgr.c, GRACE_PREEMPT); and a site may cancel what it preempts.
            slurm.forbid_requeue(job_id)
            refusal = "preempted"
        else:
            refusal = _requeue(job_id)
        if not refusal:
            return "requeued"
        if is_shared:
            return f"stopped, and not requeued ({refusal}); resume sends what is left once the whole array has ended"
        sent = go_on(paths, SlurmLauncher(), stage.name)
        return f"not requeued ({refusal}), but continued by a new job of {', '.join(sent)}"
    except SousbatchError as error:
        return f"stopped, and not continued: {error}; `sousbatch resume {paths.run_id}` goes on"


def _requeue(job_id: str) -> str:
    """Requeue a job; return why Slurm refuses it, or the empty string."""
    try:
        slurm.requeue(job_id)
    except UnreachableError:
        raise
    except SlurmError as refusal:
        return str(refusal)
    return ""
