"""Submit, resume, cancel and clean runs, in one way for every launcher.

The ledger has the intent before anything is sent, and the job's id after. If a process dies in
between, the next submission looks the key up and adopts what it finds: no job twice, none lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .. import files, ledger
from ..errors import NoRoomError, NotFoundError, PlanError, UnreachableError, UsageError, no_room_named
from ..events import Adopted, CancelAsked, Intent, Sent
from ..publishing.send import refuse_taken
from ..recipes.plan import Plan, read_plan
from ..recipes.search import require_optuna
from ..run_folder import RunPaths, is_point, points_in
from ..run_index import forget_run, remember_run
from .base import FINAL_WORDS, JobRef, Launcher, Request, StateWord
from .freeze import accept_environment, freeze, read_requests, take_time_limits
from .overview import jobs_left, many_states
from .registry import watcher
from .reservations import hold_by_jobs, reserve
from .states import StageState
from .status import adoptable, asking, job_refs, run_states


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """The result of a submission: the stages it sent, and the states it found."""

    paths: RunPaths
    plan: Plan
    sent: tuple[str, ...]
    found: Mapping[str, StageState]
    is_new: bool

    @property
    def ended(self) -> dict[str, StateWord]:
        """The stages that were sent before and had ended, but not well, with their words."""
        return {
            name: state.word
            for name, state in self.found.items()
            if state.word in FINAL_WORDS and state.word != "done" and state.was_sent
        }


def submit(plan: Plan, launcher: Launcher, runs: Path, *, again: bool = False) -> Submitted:
    """Freeze *plan* into its run folder and send what is not under way yet.

    The same plan finds its run: a finished or running one is left alone, one that was interrupted, stopped or has
    failed resumes, with the time limits of *plan*.

    Raises:
        UnreachableError: the run is there, and it is unknown whether its jobs run.
        PlanError: what other runs are promised leaves no space for its final weights; nothing was sent.
        UsageError: the folder that a stage publishes to holds something else; nothing was sent.
        NoRoomError: the disk is full; nothing was sent that is not on record.
    """
    paths = _run_paths(plan, runs, again)
    for stage in plan.stages if not paths.plan.is_file() else ():
        if stage.record.leaves == "publication" and stage.settings.publish.url is not None:
            refuse_taken(stage.settings.publish.url, paths.run_id)
    with no_room_named(f"the run {paths.root}"), files.locked(files.make_private_dir(paths.root) / paths.lock.name):
        is_new = not paths.plan.is_file()
        if is_new:
            freeze(plan, launcher, paths)
        frozen = plan if is_new else read_plan(paths.plan)
        _adopt(launcher, paths)
        try:
            found = run_states(frozen, paths, launcher)
            if not is_new and _pending(frozen, found):
                frozen = take_time_limits(frozen, plan, launcher, paths)
            return _send(frozen, launcher, paths, found, is_new=is_new)
        except PlanError:
            if is_new and not job_refs(ledger.read(paths.ledger_dir)):  # nothing was sent, so it never was a run
                forget_run(paths)
                files.remove_tree(paths.root)
            raise


def resume(paths: RunPaths, launcher: Launcher, *, accepts_environment: bool = False) -> Submitted:
    """Send every stage of a run that is neither done nor under way.

    With *accepts_environment* the jobs may find the package versions of now in place of those at submission.
    """
    _refuse_point(paths, "resume")
    with no_room_named(f"the run {paths.root}"), _held(paths):
        plan = read_plan(paths.plan)
        if plan.sweep is not None and plan.sweep.search is not None:
            require_optuna(f"search {paths.run_id}")
        _adopt(launcher, paths)
        remember_run(paths)
        found = run_states(plan, paths, launcher)
        if accepts_environment:
            accept_environment(plan, launcher, paths)
        return _send(plan, launcher, paths, found, is_new=False)


def cancel(paths: RunPaths, launcher: Launcher, *, save: bool) -> tuple[str, ...]:
    """End the jobs of a run that are under way and return their stages."""
    _refuse_point(paths, "cancel")
    with _held(paths):  # another submission would send what follows
        plan = read_plan(paths.plan)
        states = run_states(plan, paths, launcher)
        refs = job_refs(ledger.read(paths.ledger_dir, max_steps=1), launcher)
        live = tuple(name for name, state in states.items() if state.word not in FINAL_WORDS and name in refs)
        if live:
            client = ledger.open_client(paths.ledger_dir)  # first, so that no stage takes it for Slurm's own wish
            for name in live:
                client.write(CancelAsked(stage=name, save=save))
            client.close()
            launcher.cancel([refs[name] for name in live], save=save)
    return live


def cancel_left(paths: RunPaths, launcher_of: Callable[[str], Launcher]) -> tuple[str, ...]:
    """End the jobs of a run that is gone or unreadable; return their stages.

    Raises:
        UnreachableError: Slurm, which may have jobs of it, cannot be asked.
    """
    left, silence = jobs_left([paths], launcher_of)
    live = [job for job in left.get(paths.root, ()) if job.state.word not in FINAL_WORDS]
    if silence and not left:
        raise UnreachableError(f"run {paths.run_id}: {silence}; try again where and when Slurm answers")
    stages = tuple(dict.fromkeys(job.stage for job in live))
    if live and paths.ledger_dir.is_dir():
        with suppress(OSError):  # it may be what is damaged
            client = ledger.open_client(paths.ledger_dir)
            for stage in stages:
                client.write(CancelAsked(stage=stage, save=False))
            client.close()
    for name in {job.ref.launcher for job in live}:
        launcher_of(name).cancel([job.ref for job in live if job.ref.launcher == name], save=False)
    return stages


def resend(paths: RunPaths, launcher: Launcher, stage: str) -> tuple[str, ...]:
    """Send a running stage and its dependents again; its job is about to end."""
    with _held(paths):
        plan = read_plan(paths.plan)
        found = dict(run_states(plan, paths, launcher))
        found[stage] = replace(found[stage], word="stopped")
        return _send(plan, launcher, paths, found, is_new=False).sent


def clean(
    paths: RunPaths,
    launcher_of: Callable[[str], Launcher],
    *,
    whole: bool,
    is_named: bool,
    despite_jobs: bool = False,
) -> int:
    """Remove what a finished run can do without; return the bytes freed.

    With *whole* the run folder goes, too.

    With *despite_jobs* that is done also where it is unknown whether the run's jobs still run.

    Raises:
        UsageError: the run is under way or may be, or *is_named* and it could still be resumed.
    """
    with _held(paths) if paths.root.is_dir() else nullcontext():
        owner = RunPaths(root=paths.runs_dir) if whole and is_point(paths) else paths  # the sweep has the point's job
        objection = _why_kept(owner, launcher_of, whole=whole, despite_jobs=despite_jobs)
        if objection and is_named:
            raise UsageError(f"run {owner.run_id} {objection}")
        return 0 if objection else _remove(paths, whole=whole)


def _why_kept(paths: RunPaths, launcher_of: Callable[[str], Launcher], *, whole: bool, despite_jobs: bool) -> str:
    """Return why a run is not to be cleaned, or the empty string."""
    ((look, _, states),) = many_states([paths], launcher_of)
    words = {state.word for state in states.values()}
    if words == {"done"}:
        return ""
    left, silence = jobs_left([paths], launcher_of) if look.problem else ({}, "")
    live = [job for job in left.get(paths.root, ()) if job.state.word not in FINAL_WORDS]
    if live or words & {"waiting", "running", "stopping"}:
        return "is not finished: cancel it first"
    if not look.problem and "unknown" in words:
        silence = next(state.reason for state in states.values() if state.word == "unknown")
    if silence and not left and not (whole and despite_jobs):
        return f"may be under way: {silence}; --all --although-jobs-may-run removes the whole run all the same"
    return "" if whole else "is not finished: resume needs its checkpoints; --all removes the whole run"


def _refuse_point(paths: RunPaths, verb: str) -> None:
    """Raise UsageError for a point: its sweep has its job."""
    if is_point(paths):
        sweep = paths.runs_dir.name
        raise UsageError(f"run {paths.run_id} is a point of {sweep}, which has its job; `sousbatch {verb} {sweep}`")


def _remove(paths: RunPaths, *, whole: bool) -> int:
    runs = [paths, *points_in(paths)]
    doomed = [paths.root] if whole else [path for run in runs for path in (run.checkpoints_dir, *run.unit_dirs())]
    freed = sum(files.num_bytes_below(path) for path in doomed)
    if whole:
        forget_run(paths)
    for path in doomed:
        files.remove_tree(path)
    return freed


@contextmanager
def _held(paths: RunPaths) -> Iterator[None]:
    """Hold a run that exists against every other client."""
    if not paths.root.is_dir():
        raise NotFoundError(f"{paths.root} does not exist any more")
    with files.locked(paths.lock):
        yield


def _run_paths(plan: Plan, runs: Path, again: bool) -> RunPaths:
    folder, number = runs / plan.recipe.name, 1
    paths = RunPaths(root=folder / plan.run_id)
    while again and paths.plan.is_file():
        number += 1
        paths = RunPaths(root=folder / f"{plan.run_id}-{number}")
    return paths


def _adopt(launcher: Launcher, paths: RunPaths) -> None:
    """Record the jobs that were accepted while the record of it was lost."""
    with asking(paths):
        found = adoptable(ledger.read(paths.ledger_dir, max_steps=1), launcher)
    if not found:
        return
    client = ledger.open_client(paths.ledger_dir)
    for intent, ref in found:
        client.write(
            Adopted(stage=intent.stage, key=intent.key, of=intent.number, launcher=ref.launcher, job_id=ref.job_id)
        )
    client.close()


def _send(
    plan: Plan, launcher: Launcher, paths: RunPaths, found: Mapping[str, StageState], *, is_new: bool
) -> Submitted:
    pending = _pending(plan, found)
    refs = {
        name: ref
        for name, ref in job_refs(ledger.read(paths.ledger_dir, max_steps=1)).items()
        if found[name].word != "done"
    }
    outdated = [refs.pop(name) for name in pending if name in refs and found[name].word not in FINAL_WORDS]
    requests = read_requests(plan, paths) if pending else {}
    if outdated:
        launcher.cancel(outdated, save=False)
    if pending:
        try:
            reserve(plan, paths, lambda name: launcher if name == launcher.name else watcher(name))
        except NoRoomError as error:
            raise PlanError([str(error)]) from error
        for stage in plan.stages:
            if stage.name in pending:  # a flag that a killed stage process left would say that the new job stops
                for task in range(stage.num_tasks):
                    paths.stop_flag(stage.name, task).unlink(missing_ok=True)
        client = ledger.open_client(paths.ledger_dir)
        try:
            for name in pending:
                refs[name] = _send_one(requests[name], launcher, client, paths, refs)
        finally:
            hold_by_jobs(paths)
        client.close()
    return Submitted(paths=paths, plan=plan, sent=tuple(pending), found=found, is_new=is_new)


def _pending(plan: Plan, found: Mapping[str, StageState]) -> list[str]:
    """Return the stages to send: neither done nor under way, or waiting for such.

    The job of a dependant knows only the old job, and would end as that one did.
    """
    pending: list[str] = []
    for stage in plan.stages:
        word = found[stage.name].word
        if word != "done" and (word in FINAL_WORDS or any(item.stage in pending for item in stage.after)):
            pending.append(stage.name)
    return pending


def _send_one(
    request: Request, launcher: Launcher, client: ledger.Ledger, paths: RunPaths, refs: Mapping[str, JobRef]
) -> JobRef:
    # the token keeps a run that was removed by hand and submitted again from finding its old jobs
    key = f"{paths.recipe_name}.{paths.run_id}.{request.stage}.{client.number}-{secrets.token_hex(4)}"
    client.write(Intent(stage=request.stage, key=key))
    ref = launcher.send(request, key, refs)
    client.write(Sent(stage=request.stage, key=key, launcher=ref.launcher, job_id=ref.job_id))
    return ref
