"""The declaration of a recipe's keys.

Some keys can be written down, but are for a later version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import field
from typing import Any

from ...plugins import Registry


def key(
    default: Any,
    help: str,
    *,
    also: tuple[str, ...] = (),
    was: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    later: bool = False,
    names: Registry[Any] | None = None,
) -> Any:
    """Declare a key: its default (a class makes a fresh one), its help and its range.

    *also* lists the names that other libraries give it, and *was* those that it had in earlier versions, so that an
    error can translate. *names* has what the items of a list may be. A key that comes *later* can be written
    down; a plan that needs it is refused until then.
    """
    metadata = {"help": help, "also": also, "was": was, "later": later, "names": names}
    metadata |= {"at_least": at_least, "above": above, "at_most": at_most}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def unbuilt(section: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of *section* that are for a later version.

    Only keys that have a value are given.
    """
    for one in dataclasses.fields(section):
        value = getattr(section, one.name)
        if one.metadata.get("later"):
            default = one.default if one.default is not dataclasses.MISSING else type(value)()
            if value != default:
                yield prefix + one.name
        elif dataclasses.is_dataclass(value):
            yield from unbuilt(value, f"{prefix}{one.name}.")
