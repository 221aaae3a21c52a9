"""Submission, written once for every launcher: freeze, intent, send, adopt; resume is the same.

The ledger has the intent before anything is sent, and the job's id after. Whatever dies in
between, the next submission looks the key up and adopts what it finds: no job twice, none lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import files, ledger
from ..errors import NoRoomError, NotFoundError, PlanError, UsageError, no_room_named
from ..recipes.plan import Plan, read_plan
from ..rundir import RunPaths, forget_run, remember_run
from .base import FINAL_WORDS, JobRef, Launcher, Request
from .frozen import freeze
from .reserving import reserve, stand_behind
from .status import StageState, adoptable, is_final, job_refs, run_states


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submission did: the stages it sent, and the states it found."""

    paths: RunPaths
    plan: Plan
    sent: tuple[str, ...]
    found: Mapping[str, StageState]
    is_new: bool


def submit(plan: Plan, launcher: Launcher, runs: Path, *, again: bool = False) -> Submitted:
    """Freeze *plan* into its run folder below *runs* and send what is not under way yet.

    The same plan finds its run: a finished or running one is left alone.

    Raises:
        UsageError: the run was stopped or has failed; the message names `resume`.
        PlanError: what other runs are promised leaves no room for its final weights; nothing was sent.
        NoRoomError: the store is full; nothing was sent that is not on record.
    """
    paths = _run_paths(plan, runs, again)
    with no_room_named(f"the run {paths.root}"), files.locked(files.make_private_dir(paths.root) / paths.lock.name):
        is_new = not paths.plan.is_file()
        if is_new:
            freeze(plan, launcher, paths)
        frozen = plan if is_new else read_plan(paths.plan)
        _adopt(launcher, paths)
        found = run_states(frozen, paths, launcher)
        ended = [
            name
            for name, state in found.items()
            if state.word in ("failed", "stopped", "cancelled", "lost") and state.was_sent
        ]
        if ended:
            words = ", ".join(f"{name} {found[name].word}" for name in ended)
            raise UsageError(
                f"run {paths.run_id} is there already and did not finish "
                f"({words}); `sousbatch resume {paths.run_id}` goes on"
            )
        try:
            return _send(frozen, launcher, paths, found, is_new=is_new)
        except PlanError:
            if is_new and not job_refs(ledger.read(paths.ledger_dir)):  # nothing was sent, so it never was a run
                forget_run(paths)
                files.remove_tree(paths.root)
            raise


def resume(paths: RunPaths, launcher: Launcher) -> Submitted:
    """Send every stage of a run that is neither done nor under way."""
    with no_room_named(f"the run {paths.root}"), _held(paths):
        plan = read_plan(paths.plan)
        _adopt(launcher, paths)
        remember_run(paths)
        return _send(plan, launcher, paths, run_states(plan, paths, launcher), is_new=False)


def cancel(paths: RunPaths, launcher: Launcher, *, save: bool) -> tuple[str, ...]:
    """End the jobs of a run that are under way and return their stages."""
    with _held(paths):  # a submission that goes on would send what follows
        plan = read_plan(paths.plan)
        states = run_states(plan, paths, launcher)
        refs = job_refs(ledger.read(paths.ledger_dir), launcher)
        live = tuple(name for name, state in states.items() if state.word not in FINAL_WORDS and name in refs)
        if live:
            client = ledger.open_client(paths.ledger_dir)  # first, so that no stage takes it for Slurm's own wish
            for name in live:
                client.write("cancel", stage=name, save=save)
            client.close()
            launcher.cancel([refs[name] for name in live], save=save)
    return live


def go_on(paths: RunPaths, launcher: Launcher, stage: str) -> tuple[str, ...]:
    """Send a running *stage* anew, and all that waits for it: its own job is about to end."""
    with _held(paths):
        plan = read_plan(paths.plan)
        found = dict(run_states(plan, paths, launcher))
        found[stage] = replace(found[stage], word="stopped")
        return _send(plan, launcher, paths, found, is_new=False).sent


def clean(paths: RunPaths, launcher: Launcher, *, whole: bool, is_named: bool) -> int:
    """Remove what a finished run can do without, or with *whole* all of it; return the bytes freed.

    Raises:
        UsageError: the run is under way, or *is_named* and it could still be resumed.
    """
    with _held(paths):
        states = run_states(read_plan(paths.plan), paths, launcher)
        is_done = all(state.word == "done" for state in states.values())
        if not is_final(states) or not (is_done or whole):
            if not is_named:
                return 0
            advice = (
                "cancel it first"
                if not is_final(states)
                else "resume needs its checkpoints; --all removes the whole run"
            )
            raise UsageError(f"run {paths.run_id} is not finished: {advice}")
        doomed = (
            [paths.root]
            if whole
            else [paths.root / "checkpoints", *(path.parent for path in paths.root.glob("predictions/*/*/layout.json"))]
        )
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
    found = adoptable(ledger.read(paths.ledger_dir), launcher)
    if not found:
        return
    client = ledger.open_client(paths.ledger_dir)
    for intent, ref in found:
        values = {"stage": intent.stage, "key": intent.data["key"], "of": intent.number}
        client.write("adopted", **values, launcher=ref.launcher, job_id=ref.job_id)
    client.close()


def _send(
    plan: Plan, launcher: Launcher, paths: RunPaths, found: Mapping[str, StageState], *, is_new: bool
) -> Submitted:
    pending = _pending(plan, found)
    refs = {name: ref for name, ref in job_refs(ledger.read(paths.ledger_dir)).items() if found[name].word != "done"}
    outdated = [refs.pop(name) for name in pending if name in refs and found[name].word not in FINAL_WORDS]
    if outdated:
        launcher.cancel(outdated, save=False)
    if pending:
        try:
            reserve(plan, paths, {launcher.name: launcher})
        except NoRoomError as error:
            raise PlanError([str(error)]) from error
        client = ledger.open_client(paths.ledger_dir)
        requests = {request.stage: request for request in launcher.prepare(plan, paths)}
        try:
            for name in pending:
                refs[name] = _send_one(requests[name], launcher, client, paths, refs)
        finally:
            stand_behind(paths)
        client.close()
    return Submitted(paths=paths, plan=plan, sent=tuple(pending), found=found, is_new=is_new)


def _pending(plan: Plan, found: Mapping[str, StageState]) -> list[str]:
    """Return the stages to send: what is neither done nor under way, and what waits for such a stage.

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
    values: dict[str, Any] = {"stage": request.stage, "key": key}
    client.write("intent", **values)
    ref = launcher.send(request, key, refs)
    client.write("sent", **values, launcher=ref.launcher, job_id=ref.job_id)
    return ref
