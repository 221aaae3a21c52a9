"""`sousbatch recipes`: list the library, show one recipe or every key."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import UsageError
from .parser import Parser, add_command, add_overrides, add_verbs, define
from .tables import format_table

if TYPE_CHECKING:
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


def _list(arguments: Namespace) -> int:
    from ..recipes.catalog import list_recipes

    rows = [
        {"name": recipe.name, "description": recipe.description, "path": str(recipe.path)} for recipe in list_recipes()
    ]
    print(
        json.dumps(rows, indent=1, ensure_ascii=False)
        if arguments.json
        else format_table([[row["name"], row["description"]] for row in rows])
    )
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


def _keys(found: Iterable[Option]) -> str:
    """Return every key of the schema with its values, default and meaning."""
    rows = [
        [
            option.key,
            option.takes,
            _as_override(option.default),
            "(not in this version) " * option.is_later + option.help,
        ]
        for option in found
    ]
    table = format_table(rows, header=("key", "takes", "default", "meaning"))
    return f"{table}\n\n(not in this version): a plan is refused where such a key has another value than its default"


def _as_override(value: object) -> str:
    """Return a default as one would write it."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
