"""Find what is imported by name: ours in a table, others' by entry point.

What others may extend has one `Registry`: metrics, trackers. A third-party distribution adds an entry to the
registry's entry-point group, under the name that recipes then use.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .errors import UsageError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one sort.

    *own* maps each of our names to `module:attribute`, the module below sousbatch. *of* is their type, if they share
    a class. Where it *takes_paths*, `module:attribute` names one of the user's own code.
    """

    def __init__(
        self, what: str, group: str, own: Mapping[str, str], *, of: type[T] | None = None, takes_paths: bool = False
    ) -> None:
        self._what, self._group, self._own, self._type = what, group, dict(own), of
        self._takes_paths = takes_paths

    def __iter__(self) -> Iterator[str]:
        """Yield every name, ours first."""
        yield from dict.fromkeys([*self._own, *sorted(self._others())])

    def problem(self, name: str) -> tuple[str, str]:
        """Return what is wrong with a name and a hint; both are empty for a known one."""
        if name in self._own or name in self._others() or self.is_path(name):
            return "", ""
        return f"is {name!r}; known: {', '.join(self)}", nearest(name, self)

    def is_path(self, name: str) -> bool:
        """Say whether *name* is `module:attribute` of the user's own code."""
        module, colon, attribute = name.partition(":")
        is_dotted = all(part.isidentifier() for part in (*module.split("."), attribute))
        return self._takes_paths and bool(colon) and is_dotted

    def first_known(self, names: Sequence[str]) -> str | None:
        """Return the first of *names* that is known, ours before those of others."""
        found = [name for name in names if name in self._own] or [name for name in names if name in self._others()]
        return found[0] if found else None

    def load(self, name: str) -> T:
        """Import and return what has this name; ours win over third-party ones.

        Raises:
            UsageError: nothing has this name, or what an installed package has for it cannot be imported or used.
        """
        if name in self._own:
            module, _, attribute = self._own[name].partition(":")
            return cast("T", getattr(importlib.import_module(f"{__package__}.{module}"), attribute))
        if self.is_path(name):
            return self._checked(name, name, self._import)
        others = self._others()
        if name not in others:
            hint = nearest(name, self)
            known = f"known: {', '.join(self)}" + (f" ({hint})" if hint else "")
            raise UsageError(f"{self._what} {name!r} is unknown; {known}")
        return self._checked(name, others[name].value, lambda _: others[name].load())

    def _checked(self, name: str, place: str, load: Callable[[str], Any]) -> T:
        try:
            found = load(place)
        except UsageError:
            raise
        except Exception as error:  # a third-party module may raise any error when it is imported
            raise UsageError(f"{self._what} {name!r} cannot be imported from {place}: {error!r}") from error
        if self._type is not None and not isinstance(found, self._type):
            raise UsageError(f"{self._what} {name!r} is not a {self._type.__name__}: {place} is {found!r}")
        return cast("T", found)

    def _import(self, place: str) -> Any:
        module, _, attribute = place.partition(":")
        found = importlib.import_module(module)
        if not hasattr(found, attribute):
            names = [one for one, value in vars(found).items() if self._type and isinstance(value, self._type)]
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise UsageError(f"{self._what} {place!r}: {found.__file__} has no {attribute!r}; {has}")
        return getattr(found, attribute)

    def _others(self) -> dict[str, EntryPoint]:
        if not _is_named(self._group):
            return {}
        from importlib.metadata import entry_points

        return {entry.name: entry for entry in entry_points(group=self._group)}


def _is_named(group: str) -> bool:
    """Say whether a package on sys.path may have entry points of *group*.

    Looking takes 2 ms with 100 packages; importlib.metadata, which knows for sure, takes 50 ms.
    """
    for folder in sys.path:
        try:
            found = [one.path for one in os.scandir(folder or ".") if one.name.endswith((".dist-info", ".egg-info"))]
        except NotADirectoryError:  # a zip file of packages
            return True
        except OSError:
            continue
        for path in found:
            with suppress(OSError), open(f"{path}/entry_points.txt", "rb") as stream:
                if group.encode() in stream.read():
                    return True
    return False
