"""Find where a training resumes, or that its last step is committed already."""

from __future__ import annotations

from ...checkpoints import commit
from ...checkpoints.commit import Checkpoint
from ...errors import DamagedError, RunError
from ...events import Problem
from ...recipes.plan import Batch
from ..context import JobContext, say
from .collectives import Ranks
from .rotation import CheckpointRotation


def last_checkpoint(job: JobContext, ranks: Ranks) -> Checkpoint | None:
    """Return the checkpoint to resume from: the newest full one that is intact.

    Raises:
        DamagedError: there are some, and none is as it was committed.
        RunError: a rank does not see it, as on a file system that is not shared.
    """
    folder = job.paths.checkpoints(job.stage.name)
    found = [one for one in commit.committed(folder) if one.content == "full"]
    intact = next((one for one in reversed(found) if _is_intact(one, job)), None) if ranks.rank == 0 else None
    attempt, step = ranks.from_first(list(intact.order) if intact else [-1, -len(found)])
    if step < 0:
        raise DamagedError(
            f"no checkpoint in {folder} is as it was committed; `sousbatch checkpoints verify {job.paths.run_id}` says "
            "what is wrong with each, and without them training restarts"
        )
    if attempt < 0:
        return None
    for one in found:
        if one.order == (attempt, step):
            return one
    raise RunError(f"rank {ranks.rank} does not see the checkpoint of step {step}; all nodes must share the run folder")


def _is_intact(one: Checkpoint, job: JobContext) -> bool:
    """Return whether files match the commit by size and zip directory; else report."""
    problems = commit.verify(one, reads_all=False)
    if problems:
        message = f"{one.path}: {problems[0]}; training resumes from an older one, if there is any"
        say(message)
        ledger = job.open_ledger()
        ledger.write(Problem(message=message))
        ledger.close()
    return not problems


def is_finished(job: JobContext, ranks: Ranks) -> bool:
    """Say whether the last step is committed, in full or as weights."""
    last = commit.last_committed(job.paths.checkpoints(job.stage.name))
    is_there = job.batch is not None and last is not None and last.step >= job.batch.steps
    return bool(ranks.from_first([int(is_there)])[0])


def finish(job: JobContext, batch: Batch) -> None:
    """Do what a killed attempt left undone after its last save."""
    ledger = job.open_ledger()
    CheckpointRotation(job, batch, ledger).close()
    ledger.close()
