"""`sousbatch recipes`: list, show, copy, check and compare recipes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError, UsageError
from .parser import Parser, add_command, add_overrides, add_verbs, define
from .tables import format_table

if TYPE_CHECKING:
    from ..recipes.schema import Recipe
    from ..recipes.schema.validate import Option


def define_recipes(parser: Parser) -> None:
    """Define `recipes` and its verbs."""
    define(parser, None, "recipes list", "recipes show hangul-restoration")
    verbs = add_verbs(parser)
    listing = add_command(verbs, "list", "list the recipes of the library and of $SOUSBATCH_RECIPES")
    define(listing, _list, "recipes list", "recipes list --json")
    listing.add_argument("--json", action="store_true", help="as JSON")
    show = add_command(verbs, "show", "show one composed recipe, or every key that recipes have")
    define(show, _show, "recipes show hangul-restoration adapter=full", "recipes show --keys")
    show.add_argument("recipe", nargs="?", metavar="RECIPE", help="name, or path of a YAML file")
    add_overrides(show)
    show.add_argument("--keys", action="store_true", help="list every key with its values, default and meaning")
    new = add_command(verbs, "new", "copy a recipe into a file of your own, to be edited")
    define(new, _new, "recipes new my-recipe --from hangul-restoration")
    new.add_argument("name", metavar="NAME", help="its name; the file is NAME.yaml in the working folder")
    new.add_argument("--from", dest="source", required=True, metavar="RECIPE", help="the recipe to begin with")
    check = add_command(verbs, "check", "check the keys of recipes; `sousbatch plan` looks at model and data, too")
    define(check, _check, "recipes check my-recipe.yaml", "recipes check my-recipe.yaml hangul-restoration")
    check.add_argument("recipes", nargs="+", metavar="RECIPE", help="name, or path of a YAML file")
    compare = add_command(verbs, "diff", "show the keys in which two recipes, or two runs, differ")
    define(compare, _diff, "recipes diff hangul-restoration my-recipe.yaml")
    compare.add_argument("first", metavar="A", help="name, path of a YAML file, or run:ID for the recipe of a run")
    compare.add_argument("second", metavar="B", help="the same")
    compare.add_argument("--json", action="store_true", help="as JSON")
    define(add_command(verbs, "docs", "print the reference of every key as Markdown"), _docs, "recipes docs")


def _list(arguments: Namespace) -> int:
    from ..recipes.catalog import list_groups, list_recipes

    rows = [
        {"name": recipe.name, "description": recipe.description, "path": str(recipe.path)} for recipe in list_recipes()
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    print(format_table([[row["name"], row["description"]] for row in rows], header=("recipe", "")))
    groups = [[name, ", ".join(files)] for name, files in list_groups().items()]
    print("\n" + format_table(groups, header=("group", "choose one as GROUP=NAME")))
    return 0


def _show(arguments: Namespace) -> int:
    import yaml

    from ..recipes import schema
    from ..recipes.compose import compose
    from ..recipes.schema import validate

    if arguments.keys:
        print(_keys(validate.options(schema.Recipe)))
        return 0
    if arguments.recipe is None:
        raise UsageError("name a recipe, or ask for --keys; `sousbatch recipes list` lists the library")
    recipe = compose(arguments.recipe, arguments.overrides)
    values = {"name": recipe.name, "description": recipe.description} | validate.to_plain(recipe)
    print(yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=1000), end="")
    return 0


def _new(arguments: Namespace) -> int:
    from ..recipes.catalog import copy_recipe
    from ..recipes.compose import compose

    path = copy_recipe(arguments.name, arguments.source, Path.cwd())
    try:
        compose(str(path))
    except UsageError as error:
        path.unlink()
        why = "" if isinstance(error, RecipeError) else ", since it needs the files beside it"
        raise UsageError(f"{arguments.source} cannot be copied{why}: {error}") from error
    print(f"{path.name}\nedit it, then: sousbatch plan ./{path.name}")
    return 0


def _check(arguments: Namespace) -> int:
    from ..recipes.compose import compose
    from ..recipes.stages import resolve_stages

    code = 0
    for name in arguments.recipes:
        try:
            recipe = compose(name)
        except UsageError as error:
            print(f"{name}: {error}")
            code = UsageError.exit_code
        else:
            print(f"{name}: {recipe.task}, {' > '.join(resolve_stages(recipe))}; every key is right")
    return code


def _diff(arguments: Namespace) -> int:
    from ..recipes.reference import differences

    found = differences(_named(arguments.first), _named(arguments.second))
    rows = [
        [key, *("" if value is None else json.dumps(value, ensure_ascii=False) for value in values)]
        for key, *values in found
    ]
    if arguments.json:
        named = [dict(zip(("key", "first", "second"), row, strict=True)) for row in found]
        print(json.dumps(named, indent=1, ensure_ascii=False))
    else:
        print(format_table(rows, header=("key", arguments.first, arguments.second)) if rows else "no key differs")
    return 0


def _named(text: str) -> Recipe:
    """Return the recipe called *text*, or that of the run behind `run:`."""
    from ..recipes.compose import compose
    from ..recipes.plan import read_plan
    from ..run_index import RUN_PREFIX, find_run

    if text.startswith(RUN_PREFIX):
        return read_plan(find_run(text.removeprefix(RUN_PREFIX)).plan).recipe
    return compose(text)


def _docs(arguments: Namespace) -> int:
    from ..recipes.reference import reference

    print(reference(), end="")
    return 0


def _keys(found: Iterable[Option]) -> str:
    """Return every key of the schema with its values, default and meaning."""
    from ..recipes.reference import as_override

    rows = [
        [
            option.key,
            option.takes,
            as_override(option.default),
            option.help,
        ]
        for option in found
    ]
    table = format_table(rows, header=("key", "takes", "default", "meaning"))
    return f"{table}\n\n(not in this version): a plan is refused where such a key has another value than its default"
