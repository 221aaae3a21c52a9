"""What each command does: call the packages, print what they return."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..run_folder import RunPaths, find_run, known_runs, runs_dir
from . import checkpoints, predictions, sandbox, show

if TYPE_CHECKING:
    from ..launchers.submission import Submitted
    from ..recipes.plan import Plan


def run(arguments: Namespace) -> int:
    """Do the command that was parsed and return its exit code."""
    name = arguments.command + (f" {arguments.verb}" if hasattr(arguments, "verb") else "")
    return _HANDLERS[name](arguments)


def _recipes_list(arguments: Namespace) -> int:
    from ..recipes.catalog import list_recipes

    rows = [
        {"name": recipe.name, "description": recipe.description, "path": str(recipe.path)} for recipe in list_recipes()
    ]
    print(
        json.dumps(rows, indent=1, ensure_ascii=False)
        if arguments.json
        else show.columns([[row["name"], row["description"]] for row in rows])
    )
    return 0


def _recipes_show(arguments: Namespace) -> int:
    from ..recipes import schema
    from ..recipes.compose import compose
    from ..recipes.schema import validate
    from ..recipes.yaml_files import to_yaml

    if arguments.keys:
        print(show.keys(validate.options(schema.Recipe)))
        return 0
    if arguments.recipe is None:
        raise UsageError("name a recipe, or ask for --keys; `sousbatch recipes list` lists the library")
    recipe = compose(arguments.recipe, arguments.overrides)
    print(to_yaml(recipe), end="")
    return 0


def _plan_of(arguments: Namespace, *, is_smoke: bool = False) -> Plan:
    from ..launchers import reservations
    from ..launchers.registry import choose_site, watchers
    from ..recipes.compile import compile
    from ..recipes.compose import compose
    from ..recipes.inspect.inputs import inspect
    from ..recipes.stages import smoke

    site, store = choose_site(arguments.launcher), runs_dir(arguments.runs)
    reservations.release_dead(store, watchers())
    if getattr(arguments, "sweep", None):
        from ..recipes.sweep import plan_sweep

        with show.row_progress() as progress:
            return plan_sweep(
                arguments.recipe,
                arguments.overrides,
                arguments.sweep,
                site,
                store,
                is_smoke=is_smoke,
                progress=progress,
            )
    recipe = compose(arguments.recipe, arguments.overrides)
    recipe = smoke(recipe) if is_smoke else recipe
    with show.row_progress() as progress:
        return compile(recipe, site, inspect(recipe, store, progress))


def _plan(arguments: Namespace) -> int:
    from ..errors import PlanError
    from ..launchers.registry import launcher_of
    from ..launchers.slurm.launcher import SlurmLauncher

    if arguments.num_rows:
        return _plan_rows(arguments)
    plan = _plan_of(arguments)
    launcher, runs = launcher_of(plan), runs_dir(arguments.runs)
    requests = launcher.prepare(plan, RunPaths(root=runs / plan.recipe.name / plan.run_id))
    starts: list[str] = []
    if isinstance(launcher, SlurmLauncher):
        refusals, starts = launcher.objections(requests, plan, runs)
        if refusals:
            raise PlanError(refusals)
    if arguments.json:
        print(plan.to_json(), end="")
    elif arguments.script:
        for request in requests:
            print(request.text)
    else:
        print("\n\n".join([show.plan(plan), *(["\n".join(["Slurm says:", *starts])] if starts else [])]))
    return 0


def _plan_rows(arguments: Namespace) -> int:
    """Show rows as the model sees them; no site is asked, and lengths are not looked at."""
    from ..recipes.compose import compose
    from ..recipes.inspect.data import splits_of
    from ..recipes.inspect.lengths import samples_of
    from ..recipes.inspect.model import model_facts

    recipe = compose(arguments.recipe, arguments.overrides)
    print(samples_of(recipe, model_facts(recipe), splits_of(recipe), arguments.num_rows))
    return 0


def _submit(arguments: Namespace) -> int:
    from ..cluster.environment import withheld
    from ..launchers.registry import launcher_of
    from ..launchers.submission import submit

    plan = _plan_of(arguments, is_smoke=arguments.smoke)
    for warning in plan.warnings:
        print(f"sousbatch: warning: {warning}", file=sys.stderr)
    inherit = plan.recipe.environment.inherit
    if plan.site.launcher == "slurm" and (names := withheld(os.environ, inherit)):
        print(
            f"sousbatch: warning: {', '.join(names)} of this shell hold passwords or tokens, and jobs do not get them; "
            f"environment.inherit=[{','.join([*inherit, *names])}] hands them on",
            file=sys.stderr,
        )
    done = submit(plan, launcher_of(plan), runs_dir(arguments.runs), again=arguments.again)
    if done.ended:
        name, word = next(iter(done.ended.items()))
        print(f"sousbatch: run {done.paths.run_id} is there already ({name} {word}); it goes on", file=sys.stderr)
    return _after_sending(done, arguments.detach)


def _resume(arguments: Namespace) -> int:
    from ..launchers.registry import launcher_of
    from ..launchers.submission import resume
    from ..recipes.plan import read_plan

    paths = find_run(arguments.run)
    launcher = launcher_of(read_plan(paths.plan))
    return _after_sending(resume(paths, launcher, accepts_environment=arguments.accept_environment), arguments.detach)


def _after_sending(done: Submitted, detach: bool) -> int:
    """Follow what was sent or is under way."""
    from ..launchers.registry import WATCH_S, launcher_of
    from . import follow

    is_done = all(state.word == "done" for state in done.found.values())
    run_id = done.paths.run_id
    if is_done:
        print(f"sousbatch: run {run_id} is done already; --again makes another", file=sys.stderr)
    else:
        already = "" if done.sent else " is under way already,"
        print(f"sousbatch: run {run_id}{already} on {done.plan.site.name}, in {done.paths.root}", file=sys.stderr)
    if detach:
        print(run_id)
        return 0
    if is_done:
        print(show.results(done.plan, done.paths))
        return 0
    return follow.follow(done.plan, done.paths, launcher_of(done.plan, max_age_s=WATCH_S))


def _status(arguments: Namespace) -> int:
    from ..launchers.base import FINAL_WORDS
    from ..launchers.overview import many_states
    from ..launchers.registry import LOOK_S, WATCH_S, launcher_named

    # one look tells the truth of now; those who look again and again share an answer
    look = partial(launcher_named, max_age_s=WATCH_S if arguments.watch else LOOK_S)
    while True:
        chosen = [find_run(arguments.run, newest=True, gone=True)] if arguments.run else known_runs()
        found = many_states(chosen, look)
        if not arguments.run:  # of those whose folder is gone, what still runs is told
            found += [row for row in many_states(known_runs(gone=True), look) if row[2]]
        if arguments.json:
            print(json.dumps(show.status_json(found), indent=1, ensure_ascii=False), flush=True)
        else:
            print(show.one_run(*found[0]) if arguments.run else show.status(found), flush=True)
        words = {state.word for run, _, states in found for state in states.values() if not run.problem}
        if not arguments.watch or words <= FINAL_WORDS:  # what cannot be read will not be told later either
            return 0
        time.sleep(2)


def _logs(arguments: Namespace) -> int:
    from ..launchers.registry import WATCH_S, launcher_named
    from ..recipes.plan_summary import read_summary
    from . import follow

    paths = find_run(arguments.run, newest=True)
    plan = read_summary(paths.plan)
    if not plan.stages:
        logs = paths.log("", 0).parent
        raise UsageError(f"run {paths.run_id}: {plan.problem}; what its stages printed is in {logs}")
    launcher = launcher_named(plan.launcher, max_age_s=WATCH_S)
    stage = plan.stage(arguments.stage) if arguments.stage else follow.telling_stage(plan, paths, launcher)
    return follow.print_log(plan, paths, stage, launcher, until_end=arguments.follow)


def _cancel(arguments: Namespace) -> int:
    from ..launchers.overview import problem_of
    from ..launchers.registry import launcher_named, launcher_of
    from ..launchers.submission import cancel, cancel_left
    from ..recipes.plan import read_plan

    paths = find_run(arguments.run, gone=True)
    problem = problem_of(paths)
    if problem:
        print(f"sousbatch: run {paths.run_id}: {problem}; its jobs are looked for by their names", file=sys.stderr)
        stages, advice = cancel_left(paths, launcher_named), ""
    else:
        stages = cancel(paths, launcher_of(read_plan(paths.plan)), save=arguments.save)
        advice = f"; `sousbatch resume {paths.run_id}` goes on"
    if not stages:
        print(f"sousbatch: nothing of run {paths.run_id} is waiting or running", file=sys.stderr)
        return 0
    print(f"sousbatch: cancelled {', '.join(stages)} of run {paths.run_id}{advice}", file=sys.stderr)
    return 0


def _clean(arguments: Namespace) -> int:
    from ..launchers.local.launcher import LocalLauncher
    from ..launchers.registry import launcher_named
    from ..launchers.submission import clean

    if bool(arguments.run) == bool(arguments.older):
        raise UsageError("clean takes a run or --older AGE")
    if arguments.although_jobs_may_run and not (arguments.run and arguments.all):
        raise UsageError("--although-jobs-may-run is for the whole of one run: clean RUN --all --although-jobs-may-run")
    if arguments.run:
        chosen = [find_run(arguments.run, gone=True)]
    else:
        limit = time.time() - _age_s(arguments.older)
        chosen = [paths for paths in known_runs() if paths.plan.is_file() and paths.plan.stat().st_mtime < limit]
    freed = 0
    for paths in chosen:
        freed += clean(
            paths,
            launcher_named,
            whole=arguments.all,
            is_named=bool(arguments.run),
            despite_jobs=arguments.although_jobs_may_run,
        )
        if not paths.root.exists():
            LocalLauncher().forget(f"{paths.recipe_name}.{paths.run_id}.")
    print(f"{len(chosen)} run{'s' * (len(chosen) != 1)} looked at, {show.size(freed)} freed")
    return 0


def _age_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([dh])", text)
    if match is None:
        raise UsageError(f"--older {text!r} is no age; write 30d or 12h")
    return float(match[1]) * {"d": 86_400, "h": 3_600}[match[2]]


def _doctor(arguments: Namespace) -> int:
    from .doctor import examine

    print(show.findings(examine(runs_dir(arguments.runs))))
    return 0


def _report(arguments: Namespace) -> int:
    from .. import files
    from ..launchers.overview import many_states
    from ..launchers.registry import LOOK_S, launcher_named
    from ..recipes.plan import read_plan
    from .report import page

    paths = find_run(arguments.run, newest=True)
    ((plan, _, states),) = many_states([paths], partial(launcher_named, max_age_s=LOOK_S))
    out = Path(arguments.out).expanduser() if arguments.out else paths.report
    files.write_text(out, page(plan if plan.problem else read_plan(paths.plan), paths, states))
    print(out)
    return 0


_HANDLERS: dict[str, Callable[[Namespace], int]] = {
    "recipes list": _recipes_list,
    "recipes show": _recipes_show,
    "plan": _plan,
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "resume": _resume,
    "clean": _clean,
    "report": _report,
    "doctor": _doctor,
    "checkpoints list": checkpoints.listing,
    "checkpoints verify": checkpoints.verify,
    "checkpoints prune": checkpoints.prune,
    "checkpoints consolidate": checkpoints.consolidate,
    "predictions merge": predictions.merge,
    "predictions score": predictions.score,
    "sandbox start": sandbox.start,
    "sandbox status": sandbox.status,
    "sandbox stop": sandbox.stop,
}
