"""The states of a run's stages: from its own ledger first, then from the launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import ledger
from ..errors import EXIT_STOPPED, UnreachableError, UsageError
from ..ledger import Event
from ..recipes.plan import Glance, Plan, Stage, StageGlance, glance
from ..rundir import RunPaths
from .base import JobRef, JobState, Launcher, StateWord, how_ended


@dataclass(frozen=True, kw_only=True)
class StageState:
    """Where a stage stands. *step* of *total*: optimizer steps of a train stage, rows of a predict stage."""

    word: StateWord
    reason: str = ""
    source: str = ""
    step: int = 0
    total: int = 0
    was_sent: bool = True


def unsettled(events: Sequence[Event]) -> dict[str, Event]:
    """Return the intents, by key, of which nobody recorded how they ended: a job may or may not be there."""
    settled: dict[str, int] = {}
    for event in events:
        if event.kind in ("sent", "adopted"):
            settled[event.stage] = max(settled.get(event.stage, 0), event.data.get("of", event.number))
    return {
        event.data["key"]: event
        for event in events
        if event.kind == "intent" and event.number > settled.get(event.stage, 0)
    }


def job_refs(events: Sequence[Event], launcher: Launcher | None = None) -> dict[str, JobRef]:
    """Return the job that was sent last for each stage.

    With *launcher* also those that were accepted while the record of it was lost.
    """
    refs: dict[str, tuple[int, JobRef]] = {}
    for event in events:
        if event.kind not in ("sent", "adopted"):
            continue
        number = event.data.get("of", event.number)
        if number >= refs.get(event.stage, (0, None))[0]:
            refs[event.stage] = (number, JobRef(launcher=event.data["launcher"], job_id=event.data["job_id"]))
    found = {stage: ref for stage, (_, ref) in refs.items()}
    return found | {intent.stage: ref for intent, ref in adoptable(events, launcher)} if launcher else found


def adoptable(events: Sequence[Event], launcher: Launcher) -> list[tuple[Event, JobRef]]:
    """Return the intents whose job is there though nobody recorded it.

    The launcher finds it by its key; one that it has forgotten has begun, and so is in the run's ledger.
    """
    doubtful = unsettled(events)
    known = launcher.find(list(doubtful)) if doubtful else {}
    recorded = {event.data["job_id"] for event in events if event.kind in ("sent", "adopted")}
    found = []
    for key, intent in doubtful.items():
        starts = [one for one in events if one.kind == "attempt" and one.stage == intent.stage]
        begun = [one.data.get("job", "").partition("_")[0] for one in starts]
        unrecorded = [job for job in begun if job and job not in recorded and launcher.name == "slurm"]
        if key in known:
            found.append((intent, known[key]))
        elif unrecorded:
            found.append((intent, JobRef(launcher=launcher.name, job_id=unrecorded[-1])))
    return found


def run_states(plan: Plan, paths: RunPaths, launcher: Launcher) -> dict[str, StageState]:
    """Return the state of every stage of a run, in the plan's order.

    Raises:
        UnreachableError: the scheduler does not answer, and nothing may be decided without it.
    """
    events = ledger.read(paths.ledger_dir)
    refs = _open_refs(plan, events, job_refs(events, launcher))
    jobs = launcher.states(list(refs.values()))
    return stage_states(plan, events, {name: jobs[ref] for name, ref in refs.items()}, stopping=_stopping(plan, paths))


def watch_states(plan: Plan, paths: RunPaths, launcher: Launcher) -> dict[str, StageState]:
    """Return the same for one who only looks: what the ledger knows, while the scheduler does not answer."""
    events = ledger.read(paths.ledger_dir)
    refs = _open_refs(plan, events, _tolerant_refs(events, launcher))
    jobs = _tolerant_states(launcher, list(refs.values()))
    return stage_states(plan, events, {name: jobs[ref] for name, ref in refs.items()}, stopping=_stopping(plan, paths))


def _tolerant_refs(events: Sequence[Event], launcher: Launcher) -> dict[str, JobRef]:
    try:
        return job_refs(events, launcher)
    except UnreachableError:
        return job_refs(events)


def _tolerant_states(launcher: Launcher, refs: Sequence[JobRef]) -> dict[JobRef, JobState]:
    try:
        return launcher.states(refs)
    except UnreachableError as error:  # seen at no time, so that all the ledger has is newer
        return {ref: JobState(word="waiting", reason=f"no answer: {error}", seen_at=0) for ref in refs}


def stage_states(
    plan: Plan | Glance,
    events: Sequence[Event],
    jobs: Mapping[str, JobState],
    *,
    stopping: frozenset[str] = frozenset(),
) -> dict[str, StageState]:
    """Return the states that *events* and the launcher's words *jobs* (by stage) add up to. Pure."""
    mine = _by_stage(events)
    return {
        stage.name: _state(stage, mine.get(stage.name, []), jobs.get(stage.name), stage.name in stopping)
        for stage in plan.stages
    }


def _by_stage(events: Sequence[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event.stage, []).append(event)
    return found


def _num_done(mine: Sequence[Event]) -> int:
    return len({event.task for event in mine if event.kind == "ended" and event.data["exit_code"] == 0})


def _state(stage: Stage | StageGlance, mine: Sequence[Event], job: JobState | None, is_stopping: bool) -> StageState:
    step, total = _progress(stage, mine)
    if _num_done(mine) == stage.num_tasks:
        return StageState(word="done", source="ledger", step=total, total=total)
    if job is None:
        return StageState(
            word="lost", reason="not sent; `resume` sends it", source="ledger", step=step, total=total, was_sent=False
        )
    if job.word == "done":  # the launcher saw an exit code 0 that no attempt recorded
        return StageState(word="failed", reason="ended without a record", source="ledger", step=step, total=total)
    starts = {event.task: event for event in mine if event.kind == "attempt"}  # the newest of each task
    ends = {event.task: event for event in mine if event.kind == "ended"}
    newest = {event.task: event.number for event in mine if event.role != "client"}  # they come by number
    open_at = [start.time for task, start in starts.items() if task not in ends or ends[task].number < start.number]
    word, source, code = job.word, "launcher", 0
    if word == "waiting" and any(time > job.seen_at for time in open_at):
        word, source = "running", "ledger"  # it began after the launcher was asked
    elif word == "lost" and ends and not open_at:
        code = next((end.data["exit_code"] for end in ends.values() if end.data["exit_code"]), 0)
        word, source = ("stopped" if code in (0, EXIT_STOPPED) else "failed"), "ledger"
    elif word == "lost" and is_cancelled(mine, stage.name):
        word, source = "cancelled", "ledger"
    if word == "running" and is_stopping:
        word = "stopping"
    errors = [event.data["message"] for event in mine if event.kind == "error" and event.number == newest[event.task]]
    reason = "" if source == "ledger" else job.reason
    if word == "failed":
        reason = errors[0] if errors else reason or how_ended(code)
    return StageState(word=word, reason=reason, source=source, step=step, total=total)


def is_cancelled(events: Sequence[Event], stage: str) -> bool:
    """Say whether a person asked the newest job of *stage* to end."""
    sent = [event.number for event in events if event.kind in ("sent", "adopted") and event.stage == stage]
    asked = [event.number for event in events if event.kind == "cancel" and event.stage == stage]
    return bool(asked) and max(asked) > max(sent, default=0)


def _progress(stage: Stage | StageGlance, mine: Sequence[Event]) -> tuple[int, int]:
    if stage.steps:
        steps = [event.data["step"] for event in mine if event.kind in ("step", "saved")]
        return (steps[-1] if steps else 0), stage.steps
    if stage.kind == "sweep" or (stage.kind == "consolidate" and stage.num_tasks > 1):
        return _num_done(mine), stage.num_tasks
    if stage.kind == "predict":
        rows = {event.data["unit"]: event.data["num_rows"] for event in mine if event.kind == "unit"}
        totals = [event.data["num_rows"] for event in mine if event.kind == "layout"]
        return sum(rows.values()), totals[-1] if totals else 0
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
    ends = {one.task: one.data["exit_code"] for one in ledger.read(paths.ledger_dir) if one.kind == "ended"}
    begun: dict[int, Path] = {}
    for folder in paths.root.glob("*/*/ledger"):
        for event in ledger.read(folder):
            if event.kind == "frozen" and "point" in event.data:
                begun[event.data["point"]] = folder.parent
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


def _stopping(plan: Plan | Glance, paths: RunPaths) -> frozenset[str]:
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
    return all(state.word not in ("waiting", "running", "stopping") for state in states.values())


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was read of a run before the scheduler was asked."""

    plan: Glance
    paths: RunPaths
    events: Sequence[Event]
    refs: Mapping[str, JobRef]


def many_states(
    runs: Sequence[RunPaths], launcher_of: Callable[[str], Launcher]
) -> list[tuple[Glance, RunPaths, dict[str, StageState]]]:
    """Return the states of many runs with one call to each launcher; unreadable runs are left out.

    Nobody is asked about stages that the ledger knows to be done.
    """
    looks, launchers = list[_Look](), dict[str, Launcher]()
    for paths in runs:
        try:
            plan = glance(paths.plan)
        except UsageError:
            if len(runs) == 1:
                raise
            continue
        if plan.launcher not in launchers:
            launchers[plan.launcher] = launcher_of(plan.launcher)
        events = ledger.read(paths.ledger_dir)
        refs = _open_refs(plan, events, _tolerant_refs(events, launchers[plan.launcher]))
        looks.append(_Look(plan=plan, paths=paths, events=events, refs=refs))
    jobs: dict[JobRef, JobState] = {}
    for name, launcher in launchers.items():
        asked = [ref for look in looks if look.plan.launcher == name for ref in look.refs.values()]
        jobs |= _tolerant_states(launcher, asked)
    return [
        (
            look.plan,
            look.paths,
            stage_states(
                look.plan,
                look.events,
                {name: jobs[ref] for name, ref in look.refs.items()},
                stopping=_stopping(look.plan, look.paths),
            ),
        )
        for look in looks
    ]


def _open_refs(plan: Plan | Glance, events: Sequence[Event], refs: Mapping[str, JobRef]) -> dict[str, JobRef]:
    """Return the jobs of stages that the ledger does not know to be done."""
    mine = _by_stage(events)
    done = {stage.name for stage in plan.stages if _num_done(mine.get(stage.name, [])) == stage.num_tasks}
    return {name: ref for name, ref in refs.items() if name not in done}
