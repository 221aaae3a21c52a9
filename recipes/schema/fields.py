"""The declaration of a recipe's keys."""

from __future__ import annotations

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
    names: Registry[Any] | None = None,
) -> Any:
    """Declare a key: its default (a class makes a fresh one), its help and its range.

    *also* lists the names that other libraries give it, and *was* those that it had in earlier versions, so that an
    error can translate. *names* has what the items of a list may be.
    """
    metadata: dict[str, Any] = {"help": help, "also": also, "was": was, "names": names}
    metadata |= {"at_least": at_least, "above": above, "at_most": at_most}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
