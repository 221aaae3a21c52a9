"""Check plain values against the schema: all faults at once, each with the right word.

Hydra composes, but it stops at the first fault and its structured configs know neither
`Literal` nor unions of dataclasses; so this walk over the dataclasses does the checking.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from ..errors import Fault, nearest

T = TypeVar("T")


def build(cls: type[T], values: Any, *, key: str = "") -> tuple[T | None, list[Fault]]:
    """Make a *cls* from plain *values*, or return every fault that prevents it."""
    faults: list[Fault] = []
    made = _dataclass(cls, values, key, faults)
    return (None, faults) if faults else (made, faults)


def options(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield every key of the schema below *cls* with its dotted path."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name, field
        inner = _dataclass_in(hints[field.name])
        if inner is not None and inner is not cls:
            star = "*." if typing.get_origin(hints[field.name]) is dict else ""
            yield from options(inner, f"{prefix}{field.name}.{star}")


def to_plain(value: Any) -> Any:
    """Return a dataclass as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def unknown_key(root: type, cls: type, key: str, name: str) -> Fault:
    """Describe a key that does not exist: another library's word, a near one, or the list."""
    path = f"{key}.{name}" if key else name
    translated = [known for known, field in options(root) if name in field.metadata["also"]]
    if translated:
        return Fault(key=path, problem="is another library's word", hint=f"here it is {' or '.join(translated)}")
    names = [field.name for field in dataclasses.fields(cls)]
    elsewhere = [known for known, _ in options(root) if known.rsplit(".", 1)[-1] == name]
    hint = nearest(name, names) or (f"it belongs to {elsewhere[0]}" if elsewhere else f"known here: {', '.join(names)}")
    return Fault(key=path, problem="is not a key", hint=hint)


def _dataclass_in(hint: Any) -> type | None:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    for inner in typing.get_args(hint):
        if (found := _dataclass_in(inner)) is not None:
            return found
    return None


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _dataclass(cls: type[T], values: Any, key: str, faults: list[Fault]) -> T | None:
    from .schema import Recipe

    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        faults.append(Fault(key=key or "recipe", problem=f"is {values!r}", hint="a section of keys is expected"))
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    before = len(faults)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            faults.append(unknown_key(Recipe, cls, key, str(name)))
            continue
        found = len(faults)
        made[name] = _value(hints[name], value, _join(key, name), faults)
        if len(faults) == found:
            _range(fields[name], made[name], _join(key, name), faults)
    return cls(**made) if len(faults) == before else None


def _value(hint: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        rest = [option for option in inner if option is not types.NoneType]
        return None if value is None else _value(rest[0], value, key, faults)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast("type[Any]", hint), value, key, faults)
    if origin is Literal:
        return _choice(inner, value, key, faults)
    if origin is dict:
        return _mapping(inner[1], value, key, faults)
    if origin is tuple:
        return _sequence(inner[0], value, key, faults)
    return _scalar(hint, value, key, faults)


def _choice(known: tuple[Any, ...], value: Any, key: str, faults: list[Fault]) -> Any:
    matches = [option for option in known if option == value and type(option) is type(value)]
    if matches:
        return matches[0]
    words = ", ".join(map(str, known))
    hint = nearest(str(value), [str(option) for option in known])
    faults.append(Fault(key=key, problem=f"is {value!r}; known: {words}", hint=hint))
    return None


def _mapping(inner: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        faults.append(Fault(key=key, problem=f"is {value!r}", hint="a mapping of names to values is expected"))
        return None
    return {str(name): _value(inner, item, _join(key, name), faults) for name, item in value.items()}


def _sequence(inner: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        faults.append(Fault(key=key, problem=f"is {value!r}", hint=f"a list is expected, such as [{value}]"))
        return None
    return tuple(_value(inner, item, _join(key, number), faults) for number, item in enumerate(value))


def _scalar(hint: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a word
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    faults.append(Fault(key=key, problem=f"is {value!r}", hint=f"{expected} is expected"))
    return None


def _range(field: dataclasses.Field[Any], value: Any, key: str, faults: list[Fault]) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    at_least, above, at_most = (field.metadata.get(name) for name in ("at_least", "above", "at_most"))
    if at_least is not None and not value >= at_least:
        faults.append(Fault(key=key, problem=f"is {value}", hint=f"at least {at_least:g}"))
    if above is not None and not value > above:
        faults.append(Fault(key=key, problem=f"is {value}", hint=f"above {above:g}"))
    if at_most is not None and not value <= at_most:
        faults.append(Fault(key=key, problem=f"is {value}", hint=f"at most {at_most:g}"))
