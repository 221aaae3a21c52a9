"""The states of a run's stages: from its own ledger first, then from the launcher."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import ledger
from ..errors import EXIT_STOPPED, SlurmError, UnreachableError, UsageError
from ..events import Ended, Error, Event, Frozen, Intent, PredictionStarted, Sent, Started, UnitCommitted, of
from ..ledger_queries import by_stage, done_tasks, is_cancelled, jobs_started, last_sent, last_step, unsettled
from ..recipes.plan import Plan, Stage
from ..recipes.plan_summary import PlanSummary, StageSummary
from ..recipes.stage_kinds import STAGE_KINDS
from ..run_folder import RunPaths
from .base import FINAL_WORDS, JobRef, JobState, Launcher, StateWord, how_ended

NO_ANSWER = "nobody can say now whether its jobs run: {error}"


@dataclass(frozen=True, kw_only=True)
class StageState:
    """Where a stage stands. *step* of *total*: optimizer steps of a train stage, rows of a predict stage.

    *advice* is what helps a failed one where `resume` does not.
    """

    word: StateWord
    reason: str = ""
    source: str = ""
    step: int = 0
    total: int = 0
    was_sent: bool = True
    advice: str = ""


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
    """Return the state of every stage of a run, in the plan's order, for one who decides by it.

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


def stage_states(
    plan: Plan | PlanSummary,
    events: Sequence[Event],
    jobs: Mapping[str, JobState],
    *,
    stopping: frozenset[str] = frozenset(),
) -> dict[str, StageState]:
    """Return the states that *events* and the launcher's words *jobs* (by stage) add up to. Pure."""
    mine = by_stage(events)
    return {
        stage.name: _state(stage, mine.get(stage.name, []), jobs.get(stage.name), stage.name in stopping)
        for stage in plan.stages
    }


def _state(stage: Stage | StageSummary, mine: Sequence[Event], job: JobState | None, is_stopping: bool) -> StageState:
    step, total = _progress(stage, mine)
    if len(done_tasks(mine, stage.name)) == stage.num_tasks:
        return StageState(word="done", source="ledger", step=total, total=total)
    if job is not None and job.word == "unknown":
        return StageState(
            word="unknown", reason=f"{job.reason}{_last_seen(mine)}", source="ledger", step=step, total=total
        )
    if job is None:
        return StageState(
            word="lost", reason="not sent; `resume` sends it", source="ledger", step=step, total=total, was_sent=False
        )
    if job.word == "done":  # the launcher saw an exit code 0 that no attempt recorded
        return StageState(word="failed", reason="ended without a record", source="ledger", step=step, total=total)
    starts = {event.task: event for event in of(mine, Started)}  # the newest of each task
    ends = {event.task: event for event in of(mine, Ended)}
    newest = {event.task: event.number for event in mine if event.role != "client"}  # they come by number
    open_at = [start.time for task, start in starts.items() if task not in ends or ends[task].number < start.number]
    word, source, code = job.word, "launcher", 0
    if word == "waiting" and any(time > job.seen_at for time in open_at):
        word, source = "running", "ledger"  # it began after the launcher was asked
    elif word == "lost" and ends and not open_at:
        code = next((end.exit_code for end in ends.values() if end.exit_code), 0)
        source = "ledger"
        if code in (0, EXIT_STOPPED):
            word = "stopped"
        else:
            word = "cancelled" if is_cancelled(mine, stage.name) else "failed"
    elif word == "lost" and is_cancelled(mine, stage.name):
        word, source = "cancelled", "ledger"
    if word == "running" and is_stopping:
        word = "stopping"
    errors = [event for event in of(mine, Error) if event.number == newest[event.task]]
    reason, advice = ("" if source == "ledger" else job.reason), ""
    if word == "failed":
        reason = errors[0].message if errors else reason or how_ended(code)
        advice = (errors[0].advice or "") if errors else ""
    return StageState(word=word, reason=reason, source=source, step=step, total=total, advice=advice)


def _last_seen(mine: Sequence[Event]) -> str:
    """Say what a stage's own ledger knows of it, while nobody else can be asked."""
    own = [event for event in mine if event.role != "client"]
    if not own:
        return ""
    newest, at = own[-1], max(event.time for event in own)
    codes = [event.exit_code for event in of(own, Ended) if event.number == newest.number]
    step = last_step(own)
    how = (how_ended(codes[-1]) if codes else "running") + (f" at step {step}" if step else "")
    return f"; last seen at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}: {how}"


def _progress(stage: Stage | StageSummary, mine: Sequence[Event]) -> tuple[int, int]:
    """Return how much of a stage is done, and of how much, in the unit of its kind."""
    kind = STAGE_KINDS.get(stage.kind)
    unit = kind.progress if kind else None
    if unit == "steps":
        return last_step(mine), stage.steps
    if unit == "rows":
        rows = {event.unit: event.num_rows for event in of(mine, UnitCommitted)}
        totals = [event.num_rows for event in of(mine, PredictionStarted)]
        return sum(rows.values()), totals[-1] if totals else 0
    if unit == "points" or (unit == "parts" and stage.num_tasks > 1):
        return len(done_tasks(mine, stage.name)), stage.num_tasks
    return 0, 0


@dataclass(frozen=True, kw_only=True)
class PointState:
    """Where a point of a sweep stands. *folder* is that of its run, once it has begun."""

    index: int
    label: str
    word: StateWord
    folder: Path | None = None


def point_states(plan: Plan, paths: RunPaths) -> list[PointState]:
    """Return the states of a sweep's points from the ledgers alone: one that did not begin is waiting."""
    assert plan.sweep is not None, "only a sweep has points"
    ends = {one.task: one.exit_code for one in of(ledger.read(paths.ledger_dir), Ended)}
    begun: dict[int, Path] = {}
    for folder in paths.root.glob("*/*/ledger"):
        for event in of(ledger.read(folder), Frozen):
            if event.point is not None:
                begun[event.point] = folder.parent
    words: dict[int | None, StateWord] = {None: "running", 0: "done", EXIT_STOPPED: "stopped"}
    return [
        PointState(
            index=index,
            label=point.label,
            word=words.get(ends.get(index), "failed") if index in begun or index in ends else "waiting",
            folder=begun.get(index),
        )
        for index, point in enumerate(plan.sweep.points)
    ]


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


def is_final(states: Mapping[str, StageState]) -> bool:
    """Say whether nothing of the run is waiting or running."""
    return all(state.word in FINAL_WORDS for state in states.values())


def open_refs(plan: Plan | PlanSummary, events: Sequence[Event], refs: Mapping[str, JobRef]) -> dict[str, JobRef]:
    """Return the jobs of stages that the ledger does not know to be done."""
    mine = by_stage(events)
    done = {one.name for one in plan.stages if len(done_tasks(mine.get(one.name, ()), one.name)) == one.num_tasks}
    return {name: ref for name, ref in refs.items() if name not in done}
