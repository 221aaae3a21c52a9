"""`sousbatch logs`: print what a stage printed, once or until it ends."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..launchers.base import FINAL_WORDS, Launcher
from ..launchers.overview import watch_states
from ..launchers.status import job_refs
from ..ledger import read
from ..run_folder import RunPaths
from ..run_index import find_run
from .parser import RUN_HELP, Parser, define

if TYPE_CHECKING:
    from ..recipes.plan_summary import PlanSummary, StageSummary

_POLL_S = 0.5


def define_logs(parser: Parser) -> None:
    """Define `logs`."""
    define(parser, _logs, "logs 3f2a", "logs 3f2a train -f")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("stage", nargs="?", metavar="STAGE", help="the one that failed, else the newest, when left out")
    parser.add_argument("-f", "--follow", action="store_true", help="continue until the stage ends")


def _logs(arguments: Namespace) -> int:
    from ..launchers.registry import WATCH_S, launcher_named
    from ..recipes.plan_summary import read_summary

    paths = find_run(arguments.run, newest=True)
    plan = read_summary(paths.plan)
    if not plan.stages:
        raise UsageError(f"run {paths.run_id}: {plan.problem}; what its stages printed is in {paths.log_dir}")
    launcher = launcher_named(plan.launcher, max_age_s=WATCH_S)
    stage = plan.stage(arguments.stage) if arguments.stage else _choose_stage(plan, paths, launcher)
    return _print_log(plan, paths, stage, launcher, until_end=arguments.follow)


def _choose_stage(plan: PlanSummary, paths: RunPaths, launcher: Launcher) -> StageSummary:
    """Return the first stage that failed, else the newest that began.

    Its log says most.
    """
    states = watch_states(plan, paths, launcher)
    failed = [stage for stage in plan.stages if states[stage.name].word == "failed"]
    begun = [stage for stage in plan.stages if paths.log(stage.name, 0).is_file()]
    return (failed or begun[-1:] or [plan.stages[0]])[0]


def _print_log(plan: PlanSummary, paths: RunPaths, stage: StageSummary, launcher: Launcher, *, until_end: bool) -> int:
    """Print the logs of a stage's tasks.

    With *until_end* continue until the stage has ended.
    """
    offsets = [0] * stage.num_tasks
    while True:
        is_over = _has_ended(plan, paths, stage, launcher)
        for task in range(stage.num_tasks):
            offsets[task] = _print_new(paths, stage, task, offsets[task])
        if is_over or not until_end:
            break
        time.sleep(_POLL_S)
    if not any(offsets):
        print(f"sousbatch: {stage.name} has printed nothing yet", file=sys.stderr)
    return 0


def _has_ended(plan: PlanSummary, paths: RunPaths, stage: StageSummary, launcher: Launcher) -> bool:
    if stage.name not in job_refs(read(paths.ledger_dir, max_steps=1)):
        return True
    # a run that cannot be read has no state to wait for
    return bool(plan.problem) or watch_states(plan, paths, launcher)[stage.name].word in FINAL_WORDS


def _print_new(paths: RunPaths, stage: StageSummary, task: int, offset: int) -> int:
    path = paths.log(stage.name, task)
    if not path.is_file():
        return offset
    with path.open("rb") as stream:
        stream.seek(offset)
        text = stream.read()
    if text and offset == 0:
        print(f"==> {path} <==")
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return offset + len(text)
