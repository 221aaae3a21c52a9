"""`sousbatch submit` and `resume`.

They send a run, or what it still lacks, and follow it.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from ..run_index import find_run
from ..user_folders import runs_dir
from .parser import RUN_HELP, Parser, add_recipe_arguments, define, positive_count

if TYPE_CHECKING:
    from ..launchers.submission import Submitted


def define_submit(parser: Parser) -> None:
    """Define `submit`."""
    define(
        parser,
        _submit,
        "submit hangul-restoration",
        "submit hangul-restoration train.learning_rate=1e-3 seed=2",
        "submit hangul-restoration --smoke",
        "submit hangul-restoration --detach",
        "submit hangul-restoration --smoke --sweep train.learning_rate=1e-3,1e-4 seed=1,2",
        "submit hangul-restoration --smoke --search 'train.learning_rate=tag(log, interval(1e-4,1e-2))' --trials 2",
    )
    add_recipe_arguments(parser)
    _add_detach(parser)
    parser.add_argument("--smoke", action="store_true", help="try the whole chain: 2 steps, 8 rows")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=VALUES",
        help="one run for each choice of values, all in one job array: seed=1,2 train.learning_rate=1e-3,1e-4",
    )
    parser.add_argument(
        "--search",
        nargs="+",
        metavar="KEY=SPACE",
        help="trials whose values Optuna chooses by the scores of earlier ones: "
        "'train.learning_rate=tag(log, interval(1e-5,1e-3))' seed=1,2",
    )
    parser.add_argument("--trials", type=positive_count, metavar="N", help="how many trials --search makes (20)")
    parser.add_argument(
        "--best",
        metavar="SCORE",
        help="what --search makes better: a score, or what training measures (the first score)",
    )
    parser.add_argument(
        "--fit",
        type=positive_count,
        metavar="N",
        help="take proposal N of `sousbatch plan --fit`: settings of training that fit devices, memory and disk",
    )
    parser.add_argument("--again", action="store_true", help="make another run of what has run already")


def define_resume(parser: Parser) -> None:
    """Define `resume`."""
    define(parser, _resume, "resume 3f2a", "resume 3f2a --detach")
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    _add_detach(parser)
    parser.add_argument(
        "--accept-environment",
        action="store_true",
        help="run with the present Python and packages although they differ from those at submission; this is recorded",
    )


def _add_detach(parser: Parser) -> None:
    parser.add_argument("--detach", action="store_true", help="return when the jobs are sent")


def _submit(arguments: Namespace) -> int:
    from ..cluster.environment import withheld
    from ..launchers.registry import launcher_of, watcher
    from ..launchers.reservations import release_dead
    from ..launchers.submission import submit
    from ..recipes.reference import differences
    from .plan import make_plan
    from .plan_text import all_warnings

    release_dead(runs_dir(arguments.runs), watcher)
    plan = make_plan(arguments, is_smoke=arguments.smoke)
    for warning in all_warnings(plan):
        print(f"sousbatch: warning: {warning}", file=sys.stderr)
    inherit = plan.recipe.environment.inherit
    if launcher_of(plan).keeps_environment and (names := withheld(os.environ, inherit)):
        print(
            f"sousbatch: warning: {', '.join(names)} of this shell hold passwords or tokens, so jobs do not get them; "
            f"environment.inherit=[{','.join([*inherit, *names])}] passes them",
            file=sys.stderr,
        )
    done = submit(plan, launcher_of(plan), runs_dir(arguments.runs), again=arguments.again)
    if done.ended:
        name, word = next(iter(done.ended.items()))
        print(f"sousbatch: run {done.paths.run_id} exists already ({name} {word}); it resumes", file=sys.stderr)
    limits = [[stage.resources.time_min for stage in one.stages] for one in (done.plan, plan)]
    for key, before, wanted in differences(done.plan.recipe, plan.recipe):
        if key == "description" or (key.endswith(".time_min") and limits[0] == limits[1]):
            continue
        kept = f"no {key}" if before is None else f"{key}={before}"
        print(
            f"sousbatch: warning: run {done.paths.run_id} keeps {kept}, as it was submitted; --again makes another run "
            f"with {wanted}",
            file=sys.stderr,
        )
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
    from .follow import follow
    from .results import describe_results

    is_done = all(state.word == "done" for state in done.found.values())
    run_id = done.paths.run_id
    if is_done:
        print(f"sousbatch: run {run_id} is done already; --again makes another", file=sys.stderr)
    else:
        already = "" if done.sent else " is under way already,"
        if any(state.word == "stopping" for state in done.found.values()):
            already = " is stopping, and `sousbatch resume` resumes it when it has stopped,"
        print(f"sousbatch: run {run_id}{already} on {done.plan.site.name}, in {done.paths.root}", file=sys.stderr)
    if detach:
        print(run_id)
        return 0
    if is_done:
        print(describe_results(done.plan, done.paths))
        return 0
    return follow(done.plan, done.paths, launcher_of(done.plan, max_age_s=WATCH_S))
