"""Ask launchers about the jobs of a run, and find the jobs whose record was lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import ledger
from ..errors import EXIT_STOPPED, SlurmError, UnreachableError, UsageError
from ..events import Ended, Error, Event, Frozen, Intent, Sent, Trial, TrialEnded, of
from ..ledger_queries import by_stage, done_tasks, jobs_started, last_sent, unsettled
from ..recipes.plan import Plan
from ..recipes.plan_summary import PlanSummary
from ..run_folder import RunPaths
from .base import JobRef, Launcher, StateWord
from .states import StageState, stage_states

NO_ANSWER = "it is unknown now whether its jobs run: {error}"


def job_refs(events: Sequence[Event], launcher: Launcher | None = None) -> dict[str, JobRef]:
    """Return the job that was sent last for each stage.

    With *launcher* also those that were accepted while the record of it was lost.
    """
    found = {stage: JobRef(launcher=sent.launcher, job_id=sent.job_id) for stage, sent in last_sent(events).items()}
    return found | {intent.stage: ref for intent, ref in adoptable(events, launcher)} if launcher else found


def adoptable(events: Sequence[Event], launcher: Launcher) -> list[tuple[Intent, JobRef]]:
    """Return the intents whose job is there though nobody recorded it.

    The launcher finds it by its key; one that it has forgotten has begun, and so is in the run's ledger.
    """
    doubtful = unsettled(events)
    known = launcher.find(list(doubtful)) if doubtful else {}
    recorded = {event.job_id for event in of(events, Sent)}
    found = []
    for key, intent in doubtful.items():
        begun = jobs_started(events, intent.stage)
        unrecorded = [job for job in begun if job and job not in recorded]
        if key in known:
            found.append((intent, known[key]))
        elif unrecorded:
            found.append((intent, JobRef(launcher=launcher.name, job_id=unrecorded[-1])))
    return found


def run_states(plan: Plan | PlanSummary, paths: RunPaths, launcher: Launcher) -> dict[str, StageState]:
    """Return the state of every stage of a run, for a caller that decides by it.

    Raises:
        UnreachableError: the scheduler cannot be asked, and nothing may be decided without it.
        UsageError: the ledger is damaged, so that it may lack a job.
    """
    reader = ledger.LedgerReader(paths.ledger_dir, max_steps=1)
    events = reader.poll()
    if reader.damage or not events:
        problem = reader.damage or f"{paths.ledger_dir} is empty"
        raise UsageError(
            f"run {paths.run_id}: {problem}, so that a job of it may be unknown; "
            f"`sousbatch cancel {paths.run_id}` ends what runs, and submitting with --again makes another run"
        )
    with asking(paths):
        refs = open_refs(plan, events, job_refs(events, launcher))
        jobs = launcher.states(list(refs.values()))
    found = {name: jobs[ref] for name, ref in refs.items()}
    return stage_states(plan, events, found, stopping=stopping_stages(plan, paths))


@contextmanager
def asking(paths: RunPaths) -> Iterator[None]:
    """Name the run whose jobs cannot be asked about, and what to do."""
    try:
        yield
    except SlurmError as error:
        raise UnreachableError(
            f"run {paths.run_id}: {NO_ANSWER.format(error=error)}; nothing was changed: "
            "try again where and when Slurm answers"
        ) from error


@dataclass(frozen=True, kw_only=True)
class PointState:
    """The state of a point of a sweep.

    *folder* is that of its run, once it has begun; *value* is what a trial of a search came to; *problem* is why it
    failed, as its jobs said last.
    """

    index: int
    label: str
    word: StateWord | Literal["pruned"]
    folder: Path | None = None
    value: float | None = None
    problem: str = ""


def point_states(plan: Plan, paths: RunPaths, *, is_over: bool = False) -> list[PointState]:
    """Return the states of a sweep's points, from the ledgers alone.

    A point that did not begin is waiting. One whose end nobody recorded is lost when the sweep *is_over*.
    """
    assert plan.sweep is not None, "only a sweep has points"
    ends = {one.task: one.exit_code for one in of(ledger.read(paths.ledger_dir), Ended)}
    begun: dict[int, tuple[Path, Sequence[Event]]] = {}
    for folder in paths.root.glob("*/*/ledger"):
        events = ledger.read(folder, max_steps=1)
        begun |= {event.point: (folder.parent, events) for event in of(events, Frozen) if event.point is not None}
    words: dict[int | None, StateWord] = {None: "lost" if is_over else "running", 0: "done", EXIT_STOPPED: "stopped"}
    found = []
    for index, point in enumerate(plan.sweep.points):
        own, written = begun.get(index, (None, ()))
        values = [f"{key}={value}" for trial in of(written, Trial) for key, value in trial.values.items()]
        word = words.get(ends.get(index), "failed") if own or index in ends else "waiting"
        ended = next(reversed(of(written, TrialEnded)), None)
        is_pruned = word == "done" and ended is not None and ended.word == "pruned"
        problems = [error.message for error in of(written, Error)] if word == "failed" else []
        found.append(
            PointState(
                index=index,
                label=" ".join(values) or point.label,
                word="pruned" if is_pruned else word,
                folder=own,
                value=ended.value if ended is not None else None,
                problem=problems[-1] if problems else "",
            )
        )
    return found


def stopping_stages(plan: Plan | PlanSummary, paths: RunPaths) -> frozenset[str]:
    """Return the stages whose ranks were asked to save and stop."""
    try:
        flags = {path.name for path in paths.stop_dir.iterdir()}
    except OSError:  # nothing was ever asked to stop
        return frozenset()
    return frozenset(
        stage.name
        for stage in plan.stages
        if flags and any(paths.stop_flag(stage.name, task).name in flags for task in range(stage.num_tasks))
    )


def open_refs(plan: Plan | PlanSummary, events: Sequence[Event], refs: Mapping[str, JobRef]) -> dict[str, JobRef]:
    """Return the jobs of stages that the ledger does not know to be done."""
    mine = by_stage(events)
    done = {one.name for one in plan.stages if len(done_tasks(mine.get(one.name, ()), one.name)) == one.num_tasks}
    return {name: ref for name, ref in refs.items() if name not in done}
