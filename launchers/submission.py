"""Submission, written once for every launcher: freeze, intent, send, adopt; resume is the same.

The ledger has the intent before anything is sent, and the job's id after. Whatever dies in
between, the next submission looks the key up and adopts what it finds: no job twice, none lost.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, ledger
from ..errors import UsageError
from ..recipes import check
from ..recipes.inputs import code_files
from ..recipes.plan import Plan, read_plan
from ..rundir import RunPaths, forget_run, remember_run
from .base import JobRef, Launcher, Request
from .status import StageState, is_final, job_refs, run_states


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
    """
    paths = _run_paths(plan, runs, again)
    files.make_private_dir(paths.root)
    with files.locked(paths.lock):
        is_new = not paths.plan.is_file()
        if is_new:
            _freeze(plan, launcher, paths)
        frozen = read_plan(paths.plan)
        _adopt(frozen, launcher, paths)
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
        return _send(frozen, launcher, paths, found, is_new=is_new)


def resume(paths: RunPaths, launcher: Launcher) -> Submitted:
    """Send every stage of a run that is neither done nor under way."""
    with files.locked(paths.lock):
        plan = read_plan(paths.plan)
        _adopt(plan, launcher, paths)
        remember_run(paths)
        return _send(plan, launcher, paths, run_states(plan, paths, launcher), is_new=False)


def cancel(paths: RunPaths, launcher: Launcher, *, save: bool) -> tuple[str, ...]:
    """End the jobs of a run that are under way and return their stages."""
    plan = read_plan(paths.plan)
    states = run_states(plan, paths, launcher)
    refs = job_refs(ledger.read(paths.ledger_dir))
    live = tuple(
        name for name, state in states.items() if state.word in ("waiting", "running", "stopping") and name in refs
    )
    if live:
        launcher.cancel([refs[name] for name in live], save=save)
    return live


def clean(paths: RunPaths, launcher: Launcher, *, whole: bool, is_named: bool) -> int:
    """Remove what a finished run can do without, or with *whole* all of it; return the bytes freed.

    Raises:
        UsageError: the run is under way, or *is_named* and it could still be resumed.
    """
    with files.locked(paths.lock):
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


def _run_paths(plan: Plan, runs: Path, again: bool) -> RunPaths:
    folder, number = runs / plan.recipe.name, 1
    paths = RunPaths(root=folder / plan.run_id)
    while again and paths.plan.is_file():
        number += 1
        paths = RunPaths(root=folder / f"{plan.run_id}-{number}")
    return paths


def _freeze(plan: Plan, launcher: Launcher, paths: RunPaths) -> None:
    """Write all that the jobs will read; plan.json last, since it makes the folder a run."""
    import yaml

    for folder in plan.recipe.environment.code:
        source = Path(folder).expanduser().resolve()
        for path in code_files(source):
            target = paths.code_dir / source.name / path.relative_to(source)
            files.make_private_dir(target.parent)
            shutil.copyfile(path, target)
    for request in launcher.prepare(plan, paths):
        files.make_private_dir(paths.request(request.stage).parent)
        files.write_text(paths.request(request.stage), request.text)
    text = yaml.safe_dump(check.to_plain(plan.recipe), allow_unicode=True, sort_keys=False)
    files.write_text(paths.recipe, text)
    files.sync_tree(paths.root)
    files.write_text(paths.plan, plan.to_json())
    remember_run(paths)


def _adopt(plan: Plan, launcher: Launcher, paths: RunPaths) -> None:
    """Record the jobs that were accepted while the record of it was lost."""
    events = ledger.read(paths.ledger_dir)
    known = {event.data["key"] for event in events if event.kind in ("sent", "adopted")}
    doubtful = [event for event in events if event.kind == "intent" and event.data["key"] not in known]
    found = launcher.find([event.data["key"] for event in doubtful])
    if not found:
        return
    client = ledger.open_client(paths.ledger_dir)
    for event in doubtful:
        ref = found.get(event.data["key"])
        if ref is not None:
            client.write(
                "adopted",
                stage=event.stage,
                key=event.data["key"],
                launcher=ref.launcher,
                job_id=ref.job_id,
                of=event.number,
            )
    client.close()


def _send(
    plan: Plan, launcher: Launcher, paths: RunPaths, found: Mapping[str, StageState], *, is_new: bool
) -> Submitted:
    pending = [
        stage.name for stage in plan.stages if found[stage.name].word not in ("done", "waiting", "running", "stopping")
    ]
    refs = {
        name: ref
        for name, ref in job_refs(ledger.read(paths.ledger_dir)).items()
        if name not in pending and found[name].word != "done"
    }
    if pending:
        client = ledger.open_client(paths.ledger_dir)
        requests = {request.stage: request for request in launcher.prepare(plan, paths)}
        for name in pending:
            refs[name] = _send_one(requests[name], launcher, client, paths, refs)
        client.close()
    return Submitted(paths=paths, plan=plan, sent=tuple(pending), found=found, is_new=is_new)


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
