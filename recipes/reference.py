"""The reference of every key as Markdown, and what sets two recipes apart. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .schema import Recipe
from .schema.validate import Option, options, to_plain

_INTRODUCTION = """\
# Every key of a recipe

Generated from the schema by `sousbatch recipes docs`; a test keeps it in step. A key is written in the recipe's file,
as an override (`sousbatch plan RECIPE train.learning_rate=1e-4`), or for one stage in its `set`. The last column has
the words of other libraries: used by mistake, they are answered with the key that is meant. `sousbatch recipes show
--keys` prints the same list.
"""


def as_override(value: Any) -> str:
    """Return a default as one would write it; nothing for null and empty text."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def reference() -> str:
    """Return the page of every key, a table for each section of the schema."""
    sections: dict[str, list[Option]] = {}
    helps: dict[str, str] = {}
    for option in options(Recipe):
        section, _, name = option.key.rpartition(".")
        if name and option.takes.startswith(("section", "name: section")):
            helps[option.key + (".*" if option.takes.startswith("name") else "")] = option.help
        else:
            sections.setdefault(section, []).append(option)
    parts = [_INTRODUCTION]
    for section in ("", *helps):
        title = f"## `{section}`" if section else "## The recipe itself"
        about = f"\n{helps[section][0].upper()}{helps[section][1:]}.\n" if section in helps else ""
        rows = "\n".join(_row(option) for option in sections.get(section, ()))
        parts.append(
            f"{title}\n{about}\n| key | takes | default | meaning | elsewhere |\n|---|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


def _row(option: Option) -> str:
    default = as_override(option.default)
    cells = [
        f"`{option.key.rpartition('.')[2]}`",
        option.takes,
        f"`{default}`" if default else "",
        option.help,
        ", ".join(f"`{word}`" for word in option.also),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def differences(first: Recipe, second: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (key, first value, second value) for each key that differs.

    None stands for a key that one of them does not have. Their names are no difference.
    """
    left, right = (dict(flat(to_plain(replace(recipe, name="")))) for recipe in (first, second))
    keys = [*left, *(key for key in right if key not in left)]
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested mappings with their values.

    An empty mapping is a value.
    """
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values
