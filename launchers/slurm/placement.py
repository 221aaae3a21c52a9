"""Start ranks inside a Slurm job by srun, and let it be requeued or replaced."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ... import ledger
from ...cluster import slurm
from ...cluster.ports import free_port
from ...errors import EXIT_STOPPED, SlurmError, SousbatchError, UnreachableError
from ...events import Event, Sent, of
from ...job_environment import JobEnvironment
from ...ledger_queries import is_cancelled, unsettled
from ...recipes.plan import Plan, Stage
from ...recipes.sweep import STAGE as SWEEP_STAGE
from ...run_folder import RunPaths
from ..attempts import MAX_IDLE, Attempt, Stop, is_idle
from ..base import Launcher, RankCommand
from ..submission import resend
from .script import array_size, container_words


class SlurmPlacement:
    """A job of Slurm's, or one element of an array."""

    def __init__(self, launcher: Launcher, given: JobEnvironment) -> None:
        self.job_id = slurm.job_id()
        self._launcher, self._given = launcher, given

    def tasks(self, plan: Plan, stage: Stage) -> range:
        """Return the tasks that an element of an array shares out to itself."""
        first, count = self._given.task, stage.num_tasks
        if self._given.sweep is not None:  # a point runs one task after another
            return range(first, min(first + 1, count))
        return range(first, count, array_size(count, len(plan.stages), plan.site))

    def refusal(self, stage: Stage, events: Sequence[Event], past: Sequence[Attempt]) -> Stop | None:
        """Return why this job must not start.

        Another one does the work, it is done, or its last starts committed nothing.
        """
        if self._given.sweep is None and is_stray(events, stage.name, self.job_id):
            return Stop(exit_code=0, reason=f"job {self.job_id} was accepted twice, and another one does this work")
        if past and past[-1].exit_code == 0:  # requeued, or sent twice, after it was done
            return Stop(exit_code=0, reason=f"{stage.name} is done already")
        is_again = self.job_id in {attempt.job for attempt in past}
        if is_again and not stage.record.looks_after_itself and is_idle(past):
            return Stop(
                exit_code=1,
                reason=f"Slurm started this job again, but {MAX_IDLE} starts in a row committed nothing: it ends here",
            )
        return None

    def commands(self, plan: Plan, paths: RunPaths, stage: Stage) -> list[RankCommand]:
        """Return the one srun that starts all ranks, in their container if there is one."""
        environment, wanted, kind = plan.recipe.environment, stage.resources, stage.record
        cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if wanted.device == "cpu" else {}
        if kind.looks_after_itself:
            return [RankCommand(words=(sys.executable, "-u", "-m", kind.module, str(paths.root)), variables=cpu)]
        options, before = container_words(environment, stage, paths)
        python = (environment.python or "python3") if options or before else sys.executable
        rank = [python, "-u", "-m", "sousbatch.launchers.slurm.rank", kind.module, str(paths.root), stage.name]
        words = slurm.srun(
            [*before, *rank],
            nodes=wanted.nodes if stage.uses_devices else 1,
            tasks_per_node=stage.ranks_per_node,
            cpus_per_task=stage.cpus_per_rank,
            options=options,
        )
        address = {"MASTER_ADDR": slurm.node_address(slurm.first_node()), "MASTER_PORT": str(free_port(""))}
        return [RankCommand(words=tuple(words), variables=address | cpu)]

    def why_lost(self) -> str:
        """Return why no further attempt may start here, or the empty string."""
        try:
            is_ours = slurm.fate_of(self.job_id) == "running"
        except SousbatchError as error:
            return str(error)
        return "" if is_ours else "Slurm has taken the nodes away, and starts the job again where it may"

    def explain(self, stage: Stage, code: int, log: str, *, is_finished: bool) -> tuple[int, str]:
        """Return the code of the rank that failed first, and what no rank recorded.

        srun returns the largest code, and 0 also when it lost a node.
        """
        if code in (0, EXIT_STOPPED):
            is_lost = code == 0 and not is_finished and not stage.record.looks_after_itself
            if not is_lost:
                return code, ""
            if slurm.is_over_its_time(log):  # srun then ends with 0, too
                return 1, f"the time limit ended it before it could save: raise resources.{stage.name}.time_min"
            return 1, "srun ended before the ranks did: Slurm took the nodes away, or one has failed"
        line, own = slurm.first_failure(log)
        if not line.endswith("Out Of Memory"):
            return own or code, ""
        rank = line.removesuffix(": Out Of Memory")
        return own or code, f"{rank} took more host memory than the job has; raise resources.{stage.name}.memory_gb"

    def continue_later(self, paths: RunPaths, stage: Stage, past: Sequence[Attempt]) -> str:
        """Let a stage that the user did not stop resume later; return what was done.

        It is requeued where Slurm takes it back, else continued by a new job, to which its dependants move.
        """
        if stage.record.looks_after_itself:
            return ""
        if self._is_cancelled(paths, stage):
            return f"cancelled; `sousbatch resume {paths.run_id}` continues it"
        if is_idle(past):
            return f"not requeued: {MAX_IDLE} starts in a row saved nothing new; is the time limit too short?"
        try:
            return self._requeue_or_replace(paths, stage)
        except SousbatchError as error:
            return f"stopped, and not continued: {error}; `sousbatch resume {paths.run_id}` continues it"

    def _requeue_or_replace(self, paths: RunPaths, stage: Stage) -> str:
        fate = slurm.fate_of(self.job_id)
        if fate == "gone":
            return "Slurm ends this job, or has requeued it"
        is_shared = self._given.sweep is not None or stage.num_tasks > 1
        if fate == "preempted" and not is_shared:
            # Since 24.05 a requeued job keeps its mark of a preemption, and ends as PREEMPTED also when all went well,
            # which kills what waits for it (job_mgr.c, GRACE_PREEMPT); and a site may cancel what it preempts.
            slurm.forbid_requeue(self.job_id)
            refusal = "preempted"
        else:
            refusal = _requeue(self.job_id)
        if not refusal:
            return "requeued"
        if is_shared:
            return f"stopped, and not requeued ({refusal}); resume sends what is left once the whole array has ended"
        sent = resend(paths, self._launcher, stage.name)
        return f"not requeued ({refusal}), but continued by a new job of {', '.join(sent)}"

    def _is_cancelled(self, paths: RunPaths, stage: Stage) -> bool:
        """Return whether a person asked the newest job of *stage* to end.

        The job of a point is that of its sweep; the point alone may have been stopped where it is tracked.
        """
        if is_cancelled(ledger.read(paths.ledger_dir, max_steps=1), stage.name):
            return True
        if self._given.sweep is None:
            return False
        return is_cancelled(ledger.read(RunPaths(root=paths.runs_dir).ledger_dir, max_steps=1), SWEEP_STAGE)


def is_stray(events: Sequence[Event], stage: str, job_id: str) -> bool:
    """Return whether the run has another job for *stage*.

    This one was accepted late, while Slurm did not answer.
    """
    if any(intent.stage == stage for intent in unsettled(events).values()):
        return False
    known = {event.job_id for event in of(events, Sent) if event.stage == stage}
    return bool(known) and job_id.partition("_")[0] not in known


def _requeue(job_id: str) -> str:
    """Requeue a job; return why Slurm refuses it, or the empty string."""
    try:
        slurm.requeue(job_id)
    except UnreachableError:
        raise
    except SlurmError as refusal:
        return str(refusal)
    return ""
