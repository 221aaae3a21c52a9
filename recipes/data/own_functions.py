"""Find, load and call the functions of the user's own that a recipe names.

A function is named `module:function` or `package.module.function`. Planning looks for it in the folders of
`environment.code`, then in the working folder, then among the installed packages.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

from ...errors import UsageError, nearest


def split_name(name: str) -> tuple[str, str]:
    """Return the module and the function of a dotted name."""
    module, _, function = name.partition(":") if ":" in name else name.rpartition(".")
    return module, function


def find_source(name: str, folders: Sequence[str]) -> Path | None:
    """Return the file of the module of *name*, which is not imported.

    It is looked for in *folders*; None where it is in none of them.
    """
    places: Sequence[str] | None = list(folders)
    spec = None
    parts = split_name(name)[0].split(".")
    for number in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: number + 1]), places)
        if spec is None:
            return None
        places = spec.submodule_search_locations or []
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


class OwnFunction:
    """A function of the user's, which says where it failed."""

    def __init__(self, key: str, name: str, split: str) -> None:
        """Import it.

        Raises:
            UsageError: there is no such module or function, or the import failed.
        """
        self.key, self.name = key, name
        self._of_split = f" of split {split!r}" if split else ""
        module, function = split_name(name)
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise UsageError(f"{key} names {name!r}, whose import failed: {error}{_place(error)}") from error
            raise UsageError(
                f"{key} names {name!r}, and there is no module {error.name!r}: it is looked for in environment.code, "
                "in the working folder and among the installed packages"
            ) from error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            what = f"{type(error).__name__}: {error}"
            raise UsageError(f"{key} names {name!r}, whose import failed: {what}{_place(error)}") from error
        call = getattr(found, function, None)
        if not callable(call):
            names = [one for one, value in vars(found).items() if callable(value) and not one.startswith("_")]
            hint = f" ({nearest(function, names)})" if nearest(function, names) else ""
            raise UsageError(f"{key} names {name!r}, and {found.__file__} has no function {function!r}{hint}")
        self._call: Callable[..., Any] = call
        self._file = str(found.__file__)

    @property
    def takes_chance(self) -> bool:
        """Whether it takes a second value, a `random.Random`."""
        try:
            parameters = inspect.signature(self._call).parameters.values()
        except (TypeError, ValueError):
            return False
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return len([one for one in parameters if one.kind in plain and one.default is one.empty]) > 1

    def __call__(self, number: int, *values: Any) -> Any:
        """Return what it makes of row *number*, counted from 1.

        Raises:
            UsageError: it raised; the message has the row, the error, and the line in its file.
        """
        try:
            return self._call(*values)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            raise UsageError(
                f"{self.key}: {self.name} failed at row {number}{self._of_split}: "
                f"{_one_line(what)}{_place(error, self._file)}"
            ) from error

    def checked(self, number: int, row: Any, allowed: str) -> dict[str, Any]:
        """Return *row* where it is a row.

        Raises:
            UsageError: it is none; the message says what it is and what is *allowed*.
        """
        if type(row) is not dict:
            self.refuse(number, row, allowed)
        where = self._returned(number)
        for column, value in row.items():
            if type(column) is not str:
                raise UsageError(f"{where} a column called {column!r}; the name of a column is text")
            if (wrong := _not_plain(value)) is not None:
                raise UsageError(
                    f"{where} {_kind(wrong)} in column {column!r} ({_one_line(repr(wrong))}); a column holds text, a "
                    "number, true or false, or lists and objects of these"
                )
        return row

    def refuse(self, number: int, value: Any, allowed: str) -> NoReturn:
        """Raise a UsageError that says what it returned and what is *allowed*."""
        raise UsageError(f"{self._returned(number)} {_kind(value)} ({_one_line(repr(value))}); it returns {allowed}")

    def _returned(self, number: int) -> str:
        return f"{self.key}: {self.name} returned at row {number}{self._of_split}"


def _not_plain(value: Any) -> Any:
    """Return the first part of *value* that JSON cannot hold, or None."""
    if value is None or isinstance(value, (bool, int, float)):
        return None
    if isinstance(value, str):
        return None if value.isascii() or _encodes(value) else value
    if isinstance(value, list):
        return next((wrong for one in value if (wrong := _not_plain(one)) is not None), None)
    if isinstance(value, Mapping) and all(type(name) is str for name in value):
        return _not_plain(list(value.values()))
    return value


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _place(error: BaseException, file: str = "") -> str:
    """Return " (file:line)" of the innermost frame in the user's *file*.

    Without one, it is that of the innermost frame.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    chosen = [frame for frame in frames if frame.filename == file] or [
        frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    return f" ({chosen[-1].filename}:{chosen[-1].lineno})" if chosen else ""
