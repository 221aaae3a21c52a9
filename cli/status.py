"""`sousbatch status`: where runs stand, and what helps those that failed."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..run_folder import RunPaths, is_point
from ..run_index import find_run, known_runs
from .parser import RUN_HELP, Parser, define
from .tables import format_table

if TYPE_CHECKING:
    from ..launchers.states import StageState
    from ..recipes.plan_summary import PlanSummary


def define_status(parser: Parser) -> None:
    """Define `status`."""
    define(parser, _status, "status", "status 3f2a --watch")
    parser.add_argument("run", nargs="?", metavar="RUN", help=f"{RUN_HELP}; all runs when left out")
    parser.add_argument("--watch", action="store_true", help="repeat until nothing runs any more")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _status(arguments: Namespace) -> int:
    from ..launchers.base import FINAL_WORDS
    from ..launchers.overview import many_states
    from ..launchers.registry import LOOK_S, WATCH_S, launcher_named

    # a single look asks the scheduler now; watchers share an answer
    look = partial(launcher_named, max_age_s=WATCH_S if arguments.watch else LOOK_S)
    while True:
        chosen = [find_run(arguments.run, newest=True, gone=True)] if arguments.run else known_runs()
        found = many_states(chosen, look)
        if not arguments.run:  # of runs whose folder is gone, only what still runs
            found += [row for row in many_states(known_runs(gone=True), look) if row[2]]
        if arguments.json:
            values = _as_json(found)
            if arguments.run:  # of all runs it would take long
                values[0]["places"] = _places(*found[0][1:])
            print(json.dumps(values, indent=1, ensure_ascii=False), flush=True)
        else:
            print(_one_run(*found[0]) if arguments.run else _all_runs(found), flush=True)
        words = {state.word for run, _, states in found for state in states.values() if not run.problem}
        if not arguments.watch or words <= FINAL_WORDS:  # what cannot be read now will not be read later either
            return 0
        time.sleep(2)


def _all_runs(found: Sequence[tuple[PlanSummary, RunPaths, Mapping[str, StageState]]]) -> str:
    """Return one line a run."""
    if not found:
        return "no runs yet; `sousbatch submit hangul-restoration` makes one"
    rows, header = [], ["run", "recipe", "state", "stage", "folder"]
    for plan, paths, states in found:
        word, stage, reason = _summary(plan, states)
        rows.append([paths.run_id, plan.recipe_name, word, stage, paths.root, reason])
    if not any(row[-1] for row in rows):
        return format_table([row[:-1] for row in rows], header=header)
    return format_table(rows, header=[*header, "reason"])


def _summary(plan: PlanSummary, states: Mapping[str, StageState]) -> tuple[str, str, str]:
    """Return the word and the stage that say most about a run.

    Return also why nothing more is known of it.
    """
    if states and all(state.word == "done" for state in states.values()):
        return "done", "", ""
    order = (("running", "stopping"), ("unknown",), ("failed",), ("stopped",), ("cancelled",), ("waiting",), ("lost",))
    for words in order if states else ():
        for name, state in states.items():
            if state.word in words:
                progress = f" {state.step}/{state.total}" if state.total else ""
                return state.word, name + progress, state.reason if state.word == "unknown" else ""
    return ("unknown", "", plan.problem) if plan.problem else ("lost", "", "")


def _as_json(found: Sequence[tuple[PlanSummary, RunPaths, Mapping[str, StageState]]]) -> list[dict[str, Any]]:
    """Return runs and stages as plain values."""
    return [
        {
            "run": paths.run_id,
            "recipe": plan.recipe_name,
            "folder": str(paths.root),
            "state": _summary(plan, states)[0],
            "reason": _summary(plan, states)[2],
            "stages": {name: dataclasses.asdict(state) for name, state in states.items()},
        }
        for plan, paths, states in found
    ]


def _places(paths: RunPaths, states: Mapping[str, StageState]) -> list[dict[str, str]]:
    """Return as plain values where a run is shown beside its folder."""
    from ..launchers.states import is_final
    from .results import read_places

    return [dataclasses.asdict(place) for place in read_places(paths, is_over=is_final(states))]


def _one_run(plan: PlanSummary, paths: RunPaths, states: Mapping[str, StageState]) -> str:
    """Return `describe_run`, and what helps where `resume` does not."""
    text = describe_run(plan, paths, states)
    return f"{text}\n\n{advise(paths, states)}" if any(state.advice for state in states.values()) else text


def describe_run(plan: PlanSummary, paths: RunPaths, states: Mapping[str, StageState]) -> str:
    """Return one line a stage, and where the run is shown beside its folder.

    Of what failed the end of its log follows.
    """
    from ..launchers.states import is_final
    from .results import describe_places, describe_points

    rows = [
        [name, state.word, f"{state.step}/{state.total}" if state.total else "", state.reason]
        for name, state in states.items()
    ]
    text = f"run {paths.run_id} of {plan.recipe_name} in {paths.root}\n"
    text += format_table(rows, header=("stage", "state", "", "reason")) if rows else f"unknown: {plan.problem}"
    if is_point(paths):
        text += f"\n\na point of {paths.runs_dir.name}, which has its job: `sousbatch status {paths.runs_dir.name}`"
    if places := describe_places(paths, is_over=is_final(states)):
        text += f"\n\n{format_table(places)}"
    failed = [name for name, state in states.items() if state.word == "failed"]
    points = ""
    if plan.is_sweep and not plan.problem:
        from ..recipes.plan import read_plan

        points = describe_points(read_plan(paths.plan), paths, is_over=is_final(states))
    if points:
        text += f"\n\n{points}"
    elif failed:  # also of a sweep, none of whose points could begin
        text += f"\n\n{log_tail(paths, failed[0])}"
    return text


def advise(paths: RunPaths, states: Mapping[str, StageState]) -> str:
    """Return the next step for a run that is not finished."""
    if not paths.root.is_dir():
        return f"its folder {paths.root} is gone; put it back, then `sousbatch resume {paths.run_id}` resumes it"
    advice = [state.advice for state in states.values() if state.advice]
    return advice[0] if advice else f"`sousbatch resume {paths.run_id}` resumes it"


def log_tail(paths: RunPaths, stage: str, num_lines: int = 12) -> str:
    """Return the last lines of a stage's newest log, with its path.

    A task that is done has none to show beside one that is not. Where srun names a failed rank, they are that rank's.
    """
    from .. import ledger
    from ..ledger_queries import done_tasks

    done = {paths.log(stage, task) for task in done_tasks(ledger.read(paths.ledger_dir, max_steps=1), stage)}
    logs = sorted(paths.logs(stage), key=lambda path: (path not in done, path.stat().st_mtime))
    if not logs:
        return f"{stage} has no log yet"
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    failed = next((match[1] for line in lines if (match := re.match(r"srun: error: .*task (\d+): ", line))), None)
    labelled = [line for line in lines if re.match(rf" *{failed}: ", line)]
    lines = (labelled or lines)[-num_lines:]
    return "\n".join([f"{logs[-1]}:", *(f"  {line[:200]}" for line in lines)])
