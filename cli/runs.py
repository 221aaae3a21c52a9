"""`sousbatch cancel` and `clean`: end a run's jobs, free its space."""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace

from ..errors import UsageError
from ..run_index import find_run, known_runs
from .parser import RUN_HELP, Parser, define
from .tables import format_size


def define_cancel(parser: Parser) -> None:
    """Define `cancel`."""
    define(parser, _cancel, "cancel 3f2a", "cancel 3f2a --save")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--save", action="store_true", help="let training save first, at a step boundary")


def define_clean(parser: Parser) -> None:
    """Define `clean`."""
    define(parser, _clean, "clean 3f2a", "clean --older 30d", "clean 3f2a --all")
    parser.add_argument("run", nargs="?", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--older", metavar="AGE", help="all finished runs that were submitted longer ago than this: 30d, 12h"
    )
    parser.add_argument("--all", action="store_true", help="remove the whole run folder, results too")
    parser.add_argument(
        "--although-jobs-may-run",
        action="store_true",
        help="with --all: also when it is unknown whether the run's jobs have ended, such as without its Slurm",
    )


def _cancel(arguments: Namespace) -> int:
    from ..launchers.overview import problem_of
    from ..launchers.registry import launcher_named, launcher_of
    from ..launchers.submission import cancel, cancel_left
    from ..recipes.plan import read_plan

    paths = find_run(arguments.run, gone=True)
    problem = problem_of(paths)
    if problem:
        print(f"sousbatch: run {paths.run_id}: {problem}; its jobs are searched by name", file=sys.stderr)
        stages, advice = cancel_left(paths, launcher_named), ""
    else:
        stages = cancel(paths, launcher_of(read_plan(paths.plan)), save=arguments.save)
        advice = f"; `sousbatch resume {paths.run_id}` resumes it"
    if not stages:
        print(f"sousbatch: run {paths.run_id} has no job that waits or runs", file=sys.stderr)
        return 0
    print(f"sousbatch: cancelled {', '.join(stages)} of run {paths.run_id}{advice}", file=sys.stderr)
    return 0


def _clean(arguments: Namespace) -> int:
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
            launcher_named("local").forget(f"{paths.recipe_name}.{paths.run_id}.")
    print(f"checked {len(chosen)} run{'s' * (len(chosen) != 1)}, freed {format_size(freed)}")
    return 0


def _age_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([dh])", text)
    if match is None:
        raise UsageError(f"--older must be an age such as 30d or 12h, not {text!r}")
    return float(match[1]) * {"d": 86_400, "h": 3_600}[match[2]]
