"""`sousbatch plan`: show what would run and what it takes."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..run_folder import run_paths
from ..user_folders import runs_dir
from .parser import Parser, add_recipe_arguments, count, define
from .plan_data import read_inputs, show_data
from .plan_text import as_text
from .progress import row_progress
from .tables import format_size, format_table

if TYPE_CHECKING:
    from ..cluster.site import Site
    from ..recipes.facts import DiskSpace, Inputs
    from ..recipes.fit import Proposal
    from ..recipes.plan import Plan


def define_plan(parser: Parser) -> None:
    """Define `plan`."""
    define(
        parser,
        _plan,
        "plan hangul-restoration",
        "plan hangul-restoration train.global_batch=64 --json",
        "plan hangul-restoration --script",
        "plan hangul-restoration --rows 3",
        "plan my-recipe.yaml --data",
        "plan my-recipe.yaml --fit --site a100x4-40gb",
    )
    add_recipe_arguments(parser).add_argument(
        "--site",
        metavar="SITE",
        help="plan for a machine that is elsewhere: a YAML file, or one of the library's",
    )
    parser.add_argument(
        "--data",
        action="store_true",
        help="lengths of the rows, what is cut, what padding costs, and rows that training has seen; also as --json",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="the whole plan as JSON")
    shape.add_argument("--script", action="store_true", help="the exact text that would be sent for each stage")
    shape.add_argument(
        "--rows",
        type=count,
        dest="num_rows",
        metavar="N",
        help="the first N rows of each split as the model sees them",
    )
    shape.add_argument(
        "--fit",
        action="store_true",
        help="the settings of training that fit devices, memory and disk, the cheapest first",
    )


def make_plan(arguments: Namespace, *, is_smoke: bool = False) -> Plan:
    """Return the plan of a recipe, or of a sweep over it.

    Nothing but caches is written.
    """
    from ..launchers import reservations
    from ..launchers.registry import choose_site, watcher
    from ..recipes.compile import compile
    from ..recipes.compose import compose
    from ..recipes.inspect.inputs import inspect
    from ..recipes.stages import smoke

    folder = runs_dir(arguments.runs)
    dead_runs = reservations.dead_runs(folder, watcher)
    if many := _many(arguments):
        with row_progress() as progress:
            return many(
                choose_site(arguments.launcher), folder, is_smoke=is_smoke, progress=progress, dead_runs=dead_runs
            )
    if number := getattr(arguments, "fit", None):
        return _chosen(make_proposals(arguments, is_smoke=is_smoke), number)
    recipe = compose(arguments.recipe, arguments.overrides)
    recipe = smoke(recipe) if is_smoke else recipe
    site, space = _site(arguments)
    with row_progress() as progress:
        return compile(recipe, site, _at(inspect(recipe, folder, progress, dead_runs), space))


def _many(arguments: Namespace) -> Callable[..., Plan] | None:
    """Return what plans the runs of --sweep or --search; None where neither is given."""
    sweep, search, fit = (getattr(arguments, name, None) for name in ("sweep", "search", "fit"))
    if sweep and search:
        raise UsageError("--sweep runs every point, and --search chooses them; give one of them")
    if (sweep or search) and fit:
        which = "--sweep" if sweep else "--search"
        raise UsageError(f"--fit chooses settings of one run, and {which} makes many; write the settings as overrides")
    for name in ("trials", "best"):
        if getattr(arguments, name, None) is not None and not search:
            raise UsageError(f"--{name} goes with --search, which is not given")
    if sweep:
        from ..recipes.sweep import plan_sweep

        return partial(plan_sweep, arguments.recipe, arguments.overrides, sweep)
    if not search:
        return None
    from ..recipes.search import NUM_TRIALS, plan_search

    chosen = {"num_trials": arguments.trials or NUM_TRIALS, "metric": arguments.best}
    return partial(plan_search, arguments.recipe, arguments.overrides, search, **chosen)


def _site(arguments: Namespace) -> tuple[Site, DiskSpace | None]:
    """Return where to plan for, and its free space where that is not of here."""
    from ..launchers.registry import choose_site
    from ..recipes.site_file import read_site_file

    if named := getattr(arguments, "site", None):
        return read_site_file(named)
    return choose_site(arguments.launcher), None


def _at(inputs: Inputs, space: DiskSpace | None) -> Inputs:
    return inputs if space is None else replace(inputs, disk_space=space)


def make_proposals(arguments: Namespace, *, is_smoke: bool = False) -> list[Proposal]:
    """Return the settings of the recipe's training that fit, the cheapest first.

    Beside the recipe's method those that take less memory are tried.
    """
    from ..errors import PlanError, RecipeError
    from ..launchers import reservations
    from ..launchers.registry import watcher
    from ..recipes.compose import compose
    from ..recipes.fit import METHODS, propose
    from ..recipes.inspect.inputs import inspect
    from ..recipes.stages import smoke

    folder = runs_dir(arguments.runs)
    dead_runs = reservations.dead_runs(folder, watcher)
    site, space = _site(arguments)
    recipe = compose(arguments.recipe, arguments.overrides)
    given: str = recipe.adapter.method
    recipes, variants = {given: smoke(recipe) if is_smoke else recipe}, {}

    def tell(method: str, error: Exception) -> None:
        print(f"sousbatch: without adapter.method={method}: {error}", file=sys.stderr)

    for method in METHODS[METHODS.index(given) + 1 :]:
        try:
            recipe = compose(arguments.recipe, [*arguments.overrides, f"adapter.method={method}"])
            recipes[method] = smoke(recipe) if is_smoke else recipe
        except RecipeError as error:
            tell(method, error)
    with row_progress() as progress:
        for method, recipe in recipes.items():
            ahead = [other for name, other in recipes.items() if name != method]
            try:
                variants[method] = (recipe, _at(inspect(recipe, folder, progress, dead_runs, ahead=ahead), space))
            except PlanError as error:
                if method == given:
                    raise
                tell(method, error)
    return propose(variants, site)


def _chosen(proposals: Sequence[Proposal], number: int) -> Plan:
    if number > len(proposals):
        raise UsageError(f"--fit {number}: there are {len(proposals)} proposals; `sousbatch plan --fit` shows them")
    chosen = proposals[number - 1]
    print(f"sousbatch: --fit takes {' '.join(chosen.overrides) or 'the recipe as it is'}", file=sys.stderr)
    return chosen.plan


def _as_proposals(proposals: Sequence[Proposal], recipe: str) -> str:
    """Return proposals as a table, with the overrides that choose each."""
    from ..recipes.forecast.storage import Fit

    rows = []
    for number, one in enumerate(proposals, 1):
        kept = "; ".join(
            str(Fit(found.save_level, found.keeps_all)) for found in one.plan.forecast.checkpoints.values()
        )
        rows.append(
            [
                number,
                f"{one.cost:.2f}",
                f"{format_size(one.memory_bytes)} of {format_size(one.memory_there)}",
                f"{format_size(one.host_bytes)} of {format_size(one.host_there)}",
                format_size(one.plan.forecast.storage_peak_bytes),
                kept,
                " ".join(one.overrides) or "as the recipe says",
            ]
        )
    header = ("", "cost", "memory of a rank", "host memory of a node", "storage at peak", "checkpoints", "settings")
    notes = (
        "cost: an estimate of GPU time for a token, 1 for full training that exchanges nothing; memory has a margin",
        f"sousbatch submit {recipe} --fit N takes number N; its settings can be written as overrides, too",
    )
    return "\n".join([format_table(rows, header=header), "", *notes])


def _plan(arguments: Namespace) -> int:
    from ..errors import PlanError, UsageError
    from ..launchers.registry import launcher_of

    if arguments.data:
        if arguments.num_rows or arguments.fit or arguments.script:
            raise UsageError("--data goes with --json alone; leave --rows, --fit and --script out")
        return show_data(arguments)
    if arguments.num_rows:
        return _plan_rows(arguments)
    if arguments.fit:
        print(_as_proposals(make_proposals(arguments), arguments.recipe))
        return 0
    if arguments.site and arguments.script:
        raise UsageError(
            "--script is the text that would be sent from here, and --site plans for elsewhere; give one of them"
        )
    plan = make_plan(arguments)
    if arguments.site:
        print(plan.to_json() if arguments.json else as_text(plan), end="" if arguments.json else "\n")
        return 0
    launcher, runs = launcher_of(plan), runs_dir(arguments.runs)
    requests = launcher.prepare(plan, run_paths(runs, plan.recipe.name, plan.run_id))
    refusals, starts = launcher.objections(requests, plan, runs)
    if refusals:
        raise PlanError(refusals)
    if arguments.json:
        print(plan.to_json(), end="")
    elif arguments.script:
        for request in requests:
            print(request.text)
    else:
        print("\n\n".join([as_text(plan), *(["\n".join(["Slurm says:", *starts])] if starts else [])]))
    return 0


def _plan_rows(arguments: Namespace) -> int:
    """Show rows as the model sees them; no site is asked, and no lengths are counted."""
    from ..recipes.inspect.lengths import show_samples

    print(show_samples(*read_inputs(arguments), arguments.num_rows))
    return 0
