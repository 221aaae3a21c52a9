"""Read the states of many runs for people, also where some cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from .. import ledger
from ..errors import DamagedError, SlurmError, UsageError
from ..events import Event, Sent, of
from ..ledger_queries import by_stage
from ..recipes.plan import Plan
from ..recipes.plan_summary import PlanSummary, StageSummary, read_summary
from ..run_folder import RunPaths
from .base import FINAL_WORDS, JobRef, JobState, Launcher
from .registry import OWN
from .states import StageState, stage_states
from .status import NO_ANSWER, job_refs, open_refs, stopping_stages


def watch_states(plan: Plan | PlanSummary, paths: RunPaths, launcher: Launcher) -> dict[str, StageState]:
    """Return the states of a run's stages for a caller that only looks.

    What cannot be asked or read is unknown, with the reason.
    """
    ((look, _, found),) = many_states([paths], lambda _: launcher)
    rest = found.get("jobs") or StageState(word="lost", reason=look.problem or "not sent")
    return {stage.name: found.get(stage.name, rest) for stage in plan.stages}


@dataclass(frozen=True, kw_only=True)
class _Look:
    """The facts of a run that were read before any launcher was asked.

    *problem* is why its jobs cannot be asked about.
    """

    plan: PlanSummary
    paths: RunPaths
    events: Sequence[Event]
    problem: str = ""
    is_gone: bool = False
    refs: Mapping[str, JobRef] = field(default_factory=dict)


def problem_of(paths: RunPaths) -> str:
    """Return why a run cannot be read, or the empty string."""
    return _read(paths).problem


def _read(paths: RunPaths) -> _Look:
    plan, reader = read_summary(paths.plan), ledger.LedgerReader(paths.ledger_dir, max_steps=1)
    try:
        events = reader.poll()
    except DamagedError as error:
        events, reader.damage = [], str(error)
    problem = plan.problem or reader.damage or ("" if events else f"{paths.ledger_dir} is empty")
    is_gone = not paths.root.is_dir()  # looked at last, since it may be moved away at any moment
    if is_gone:
        problem, events = f"its folder is gone ({paths.root})", []
    return _Look(plan=replace(plan, problem=problem), paths=paths, events=events, problem=problem, is_gone=is_gone)


def _look(paths: RunPaths, launcher_of: Callable[[str], Launcher]) -> _Look:
    look = _read(paths)
    if look.problem:
        return look
    try:
        refs = job_refs(look.events, launcher_of(look.plan.launcher))
        return replace(look, refs=open_refs(look.plan, look.events, refs))
    except (SlurmError, UsageError) as error:  # the launcher is silent, or not installed here
        return replace(look, problem=NO_ANSWER.format(error=error))


def many_states(
    runs: Sequence[RunPaths], launcher_of: Callable[[str], Launcher]
) -> list[tuple[PlanSummary, RunPaths, dict[str, StageState]]]:
    """Return the states of many runs with one call to each launcher.

    Launchers are not asked about stages that the ledger knows to be done. A run that is damaged, of another version or
    cannot be asked about is unknown, and does not hide the others. Of a run whose folder is gone only its jobs are
    shown.
    """
    launcher_of = cache(launcher_of)
    looks = [_look(paths, launcher_of) for paths in runs]
    jobs: dict[JobRef, JobState] = {}
    silent: dict[str, str] = {}
    for name in {look.plan.launcher for look in looks if look.refs}:
        asked = [ref for look in looks if look.plan.launcher == name for ref in look.refs.values()]
        try:
            jobs |= launcher_of(name).states(asked)
        except (SlurmError, UsageError) as error:
            silent[name] = NO_ANSWER.format(error=error)
    left = jobs_left([look.paths for look in looks if look.is_gone], launcher_of)
    found = []
    for look in looks:
        if look.is_gone:
            states = _states_of_gone(look, *left)
        else:
            states = _states_of(look, jobs, silent.get(look.plan.launcher, "") if look.refs else "")
        found.append((look.plan, look.paths, states))
    return found


def _states_of(look: _Look, jobs: Mapping[JobRef, JobState], silence: str) -> dict[str, StageState]:
    stages = look.plan.stages or _stages_named(look.events)
    plan, problem = replace(look.plan, stages=stages), look.problem or silence
    if problem:
        unknown = JobState(word="unknown", reason=problem)
        return stage_states(plan, look.events, {stage.name: unknown for stage in stages})
    found = {name: jobs[ref] for name, ref in look.refs.items()}
    return stage_states(plan, look.events, found, stopping=stopping_stages(plan, look.paths))


def _stages_named(events: Sequence[Event]) -> tuple[StageSummary, ...]:
    """Return the stages that a ledger names.

    It does not say how many tasks they have, and so not when they are done.
    """
    return tuple(StageSummary(name=name, kind="", num_tasks=-1, steps=0) for name in by_stage(events) if name)


def _states_of_gone(look: _Look, left: Mapping[Path, Sequence[LeftJob]], silence: str) -> dict[str, StageState]:
    mine = left.get(look.paths.root, ())
    if silence and not mine:
        return {"jobs": StageState(word="unknown", reason=f"{look.problem}; {silence}")}
    states: dict[str, StageState] = {}
    for job in sorted(mine, key=lambda job: job.state.word != "running"):
        if job.state.word not in FINAL_WORDS:
            reason = f"{look.problem}; its job is {job.state.word}: `sousbatch cancel {look.paths.run_id}` ends it"
            states[job.stage] = StageState(word="unknown", reason=reason)
    return states


@dataclass(frozen=True, kw_only=True)
class LeftJob:
    """A job that its launcher knows of a run of which nothing can be read."""

    stage: str
    ref: JobRef
    state: JobState


def jobs_left(
    runs: Sequence[RunPaths], launcher_of: Callable[[str], Launcher]
) -> tuple[dict[Path, list[LeftJob]], str]:
    """Return the jobs of *runs*, found by their keys, and why Slurm was silent.

    Each run's own launcher is asked where plan or ledger name it. Else a machine that knows jobs of a run has all of
    them, so that Slurm is asked about the others only.
    """
    found: dict[Path, list[LeftJob]] = {}
    names = {paths.root: _launcher_name(paths) for paths in runs}
    for name in dict.fromkeys([*OWN, *filter(None, names.values())]):
        chosen = [paths for paths in runs if paths.root not in found and names[paths.root] in (name, "")]
        ask = {f"{paths.recipe_name}.{paths.run_id}.": paths.root for paths in chosen}
        if not ask or not launcher_of(name).is_here():
            continue
        try:
            known = launcher_of(name).find(list(ask))
            states = launcher_of(name).states(list(known.values())) if known else {}
        except (SlurmError, UsageError) as error:
            return found, NO_ANSWER.format(error=error)
        for key, ref in known.items():
            recipe, run_id, stage, _ = key.split(".")
            job = LeftJob(stage=stage, ref=ref, state=states[ref])
            found.setdefault(ask[f"{recipe}.{run_id}."], []).append(job)
    return found, ""


def _launcher_name(paths: RunPaths) -> str:
    look = _read(paths)
    sent = of(look.events, Sent)
    return look.plan.launcher or (sent[-1].launcher if sent else "")
