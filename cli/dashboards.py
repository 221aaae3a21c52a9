"""`sousbatch dashboards`: show, compare and save those of recipes and sweeps."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..errors import NotFoundError, UsageError
from .parser import Parser, add_command, add_overrides, add_verbs, define

if TYPE_CHECKING:
    from ..recipes.schema import Recipe
    from ..run_folder import RunPaths
    from ..tracking.dashboards import Dashboard

_SUBJECT = "a recipe by its name or YAML file, for all of its runs; or a sweep by its id or folder, for its points"


def define_dashboards(parser: Parser) -> None:
    """Define `dashboards` and its verbs."""
    define(parser, None, "dashboards show hangul-restoration", "dashboards push hangul-restoration")
    verbs = add_verbs(parser)
    show = add_command(verbs, "show", "show what the dashboard holds; needs no network and no package")
    define(show, _show, "dashboards show hangul-restoration", "dashboards show 3f2a --json")
    _add_subject(show)
    show.add_argument("--json", action="store_true", help="as JSON")
    compare = add_command(verbs, "diff", "compare the dashboard that is saved in W&B with ours; 1 where they differ")
    define(compare, _diff, "dashboards diff hangul-restoration")
    _add_subject(compare)
    push = add_command(verbs, "push", "save the dashboard in W&B, in the place of an earlier one, and print its link")
    define(push, _push, "dashboards push hangul-restoration", "dashboards push my-recipe.yaml tracking.entity=my-team")
    _add_subject(push)


def _add_subject(parser: Parser) -> None:
    parser.add_argument("subject", metavar="RECIPE|SWEEP", help=_SUBJECT)
    add_overrides(parser)


def _show(arguments: Namespace) -> int:
    from ..tracking.dashboards import outline
    from ..tracking.wandb_server import find_url
    from ..tracking.wandb_views import link

    dashboard = _dashboard(arguments)
    if arguments.json:
        print(json.dumps({"view": dashboard.view, **asdict(dashboard)}, indent=1, ensure_ascii=False))
        return 0
    print("\n".join(outline(dashboard)))
    if dashboard.entity is not None:
        print(f"`dashboards push` saves it as {link(find_url(os.environ), dashboard)}")
    return 0


def _diff(arguments: Namespace) -> int:
    from ..tracking.dashboards import compare
    from ..tracking.wandb_server import find_server
    from ..tracking.wandb_views import find_saved, link, with_entity

    with _reaching():
        server = find_server(os.environ)
        own = with_entity(server, _dashboard(arguments))
        saved = find_saved(server, own)
    if saved is None:
        where = f"{own.entity}/{own.project}"
        print(f"{where} has no dashboard {own.name!r} yet; `sousbatch dashboards push` saves it", file=sys.stderr)
        return 1
    lines = compare(saved.dashboard, own)
    print("\n".join(lines) or f"no difference: {link(server.url, own)}")
    return 1 if lines else 0


def _push(arguments: Namespace) -> int:
    from ..tracking.dashboards import remember_link
    from ..tracking.wandb_server import find_server
    from ..tracking.wandb_views import push, with_entity

    dashboard = _dashboard(arguments)
    with _reaching():
        server = find_server(os.environ)
        link = push(server, with_entity(server, dashboard))
    print(link)
    with suppress(OSError):  # `status` lacks it where the cache is full
        remember_link(dashboard, link)
    return 0


@contextmanager
def _reaching() -> Iterator[None]:
    """Refuse in one line what cannot be done without a key or a route."""
    from ..tracking.wandb_server import NoKeyError, OutOfReachError

    try:
        yield
    except NoKeyError as error:
        raise UsageError(f"{error}; `wandb login` writes it") from error
    except OutOfReachError as error:
        raise UsageError(str(error)) from error


def _dashboard(arguments: Namespace) -> Dashboard:
    """Return the dashboard of what the arguments name."""
    from ..recipes.compose import compose
    from ..recipes.dashboards import recipe_dashboard

    if (run := _run_named(arguments.subject)) is None:
        return recipe_dashboard(_tracked(compose(arguments.subject, arguments.overrides)))
    if arguments.overrides:
        raise UsageError(f"{arguments.subject} is a run, and its values are fixed; give overrides to a recipe")
    return _dashboard_of_run(run)


def _dashboard_of_run(run: RunPaths) -> Dashboard:
    from ..recipes.dashboards import recipe_dashboard, sweep_dashboard
    from ..recipes.plan import read_plan

    plan = read_plan(run.plan)
    recipe = _tracked(plan.recipe)
    if plan.sweep is None:
        return recipe_dashboard(recipe)
    if (search := plan.sweep.search) is not None:
        return sweep_dashboard(recipe, [axis.key for axis in search.axes], run.run_id, search)
    return sweep_dashboard(recipe, [point.label for point in plan.sweep.points], run.run_id)


def _tracked(recipe: Recipe) -> Recipe:
    """Return *recipe*, whose runs W&B shows.

    Raises:
        UsageError: it shows none of them.
    """
    if recipe.tracking.mode == "disabled":
        raise UsageError("tracking.mode is disabled, so that a dashboard would have no runs; set tracking.mode=auto")
    if "wandb" not in recipe.tracking.trackers:
        raise UsageError("tracking.trackers has no wandb, so that a dashboard would have no runs; add it")
    return recipe


def _run_named(subject: str) -> RunPaths | None:
    """Return the run of that name, None where it is that of a recipe."""
    from ..recipes.catalog import find_recipe
    from ..run_index import find_run

    try:
        find_recipe(subject)
        return None
    except NotFoundError as unknown:
        try:
            return find_run(subject, newest=True)
        except NotFoundError:
            raise NotFoundError(f"{unknown}; a run or sweep of that name does not exist either") from unknown
