"""Check plain values against the schema.

All faults are found at once, each with the right word. Hydra composes, but it stops at the first fault and its
structured configs know neither `Literal` nor unions of dataclasses; so this walk over the dataclasses does the
checking.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from ...errors import Fault, nearest
from ...redaction import is_secret

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)  # slow, and asked for each section


def build(cls: type[T], values: Any, *, key: str = "") -> tuple[T | None, list[Fault]]:
    """Make a *cls* from plain *values*, or return every fault that prevents it."""
    faults: list[Fault] = []
    made = _dataclass(cls, values, key, faults)
    return (None, faults) if faults else (made, faults)


def unknown_names(cls: type, values: Any, *, key: str = "") -> Iterator[Fault]:
    """Yield the names in *values* that no package installed here has.

    *values* are plain; such names are those of metrics. `build` takes them all: a plan is also read where a package of
    its names is not installed.
    """
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        value, inner = values.get(field.name) if isinstance(values, Mapping) else None, hints[field.name]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from unknown_names(inner, value, key=_join(key, field.name))
        elif (names := field.metadata["names"]) is not None:
            for number, name in enumerate(value if isinstance(value, (list, tuple)) else ()):
                problem, hint = names.problem(name) if isinstance(name, str) else ("", "")
                if problem:
                    yield Fault(key=_join(_join(key, field.name), number), problem=problem, hint=hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One key of the schema.

    *takes* says what values it may have; *default* is None for a section.
    """

    key: str
    takes: str
    default: Any
    help: str
    also: tuple[str, ...]
    was: tuple[str, ...]


def options(cls: type, prefix: str = "") -> Iterator[Option]:
    """Yield every key of the schema below *cls*."""
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        yield Option(
            key=prefix + field.name,
            takes=_takes(hints[field.name], field),
            default=None if field.default is dataclasses.MISSING else field.default,
            help=field.metadata["help"],
            also=field.metadata["also"],
            was=field.metadata["was"],
        )
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
    """Describe a key that does not exist.

    The hint is another library's word, a near one, or the list.
    """
    path = f"{key}.{name}" if key else name
    known_keys = list(options(root))
    if renamed := [option for option in known_keys if name in option.was]:
        return Fault(key=path, problem=f"is now {renamed[0].key}", hint=renamed[0].takes)
    translated = [option.key for option in known_keys if name in option.also]
    if translated:
        return Fault(key=path, problem="is another library's word", hint=f"here it is {' or '.join(translated)}")
    names = [field.name for field in dataclasses.fields(cls)]
    elsewhere = [option.key for option in known_keys if option.key.rsplit(".", 1)[-1] == name]
    near = nearest(name, names) or (f"it is {' or '.join(elsewhere[:3])}" if elsewhere else "")
    hint = near or f"known here: {', '.join(names)}"
    return Fault(key=path, problem="is not a key", hint=hint)


def _takes(hint: Any, field: dataclasses.Field[Any]) -> str:
    """Say in a few words what values a key takes."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if (names := field.metadata["names"]) is not None:
        return f"list of {' | '.join(names)}"
    if origin in (Union, types.UnionType):
        return ", or ".join("null" if option is types.NoneType else _takes(option, field) for option in inner)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if dataclasses.is_dataclass(hint):
        return "section"
    if origin is dict:
        return f"name: {_takes(inner[1], field)}"
    if origin is tuple:
        return f"list of {_takes(inner[0], field)}"
    limits = (("at_least", ">="), ("above", ">"), ("at_most", "<="))
    bounds = [f" {sign} {field.metadata[name]}" for name, sign in limits if field.metadata[name] is not None]
    return _WORDS.get(hint, "value") + ",".join(bounds)


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
    from . import Recipe

    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        faults.append(Fault(key=key or "recipe", problem=f"is {values!r}", hint=_section_hint(cls, key)))
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = _hints(cls)
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
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    faults += [Fault(key=_join(key, name), problem="is missing") for name in missing]
    return cls(**made) if len(faults) == before else None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value, key, faults)
    if origin in (Union, types.UnionType):
        rest = [option for option in inner if option is not types.NoneType]
        if value is None and len(rest) < len(inner):
            return None
        wanted = tuple if isinstance(value, (list, tuple)) else dict if isinstance(value, Mapping) else None
        fitting = [option for option in rest if wanted is not None and typing.get_origin(option) is wanted]
        return _value((fitting or rest)[0], value, key, faults)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast("type[Any]", hint), value, key, faults)
    if origin is Literal:
        return _choice(inner, value, key, faults)
    if origin is dict:
        return _mapping(inner[1], value, key, faults)
    if origin is tuple:
        return _sequence(inner[0], value, key, faults)
    return _scalar(hint, value, key, faults)


def _section_hint(cls: Any, key: str) -> str:
    before, _, name = key.rpartition(".")
    if name in {field.name for field in dataclasses.fields(cls)}:
        return f"the name of a stage comes before it, as in {before}.train.{name}"
    return f"a section of keys is expected, such as {_join(key, dataclasses.fields(cls)[0].name)}"


def _plain(value: Any, key: str, faults: list[Fault]) -> Any:
    """Return *value* if JSON can say it.

    Free sections end up in the plan and in other libraries' files.
    """
    if isinstance(value, Mapping):
        return {str(name): _plain(item, _join(key, name), faults) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, _join(key, number), faults) for number, item in enumerate(value)]
    if value is None or isinstance(value, (bool, str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    faults.append(Fault(key=key, problem=f"is {value!r}", hint="text or a finite number is expected"))
    return None


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
    # a label may be true or false, and the data's are called so, as JSON does
    names = {str(name).lower() if isinstance(name, bool) else str(name): item for name, item in value.items()}
    return {name: _value(inner, item, _join(key, name), faults) for name, item in names.items()}


def _sequence(inner: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        faults.append(Fault(key=key, problem=f"is {value!r}", hint=f"a list is expected, such as [{value}]"))
        return None
    return tuple(_value(inner, item, _join(key, number), faults) for number, item in enumerate(value))


def _scalar(hint: Any, value: Any, key: str, faults: list[Fault]) -> Any:
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-4 as a word
        except (ValueError, OverflowError):
            pass
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if is_right and not (hint is float and not math.isfinite(value)):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text, in quotes,"}[hint]
    is_hidden = key.startswith("environment.variables.") and is_secret(key.rpartition(".")[2], str(value))
    problem = "is a secret, and no text" if is_hidden else f"is {value!r}"
    faults.append(Fault(key=key, problem=problem, hint=f"{expected} is expected"))
    return None


def _range(field: dataclasses.Field[Any], value: Any, key: str, faults: list[Fault]) -> None:
    for number, item in enumerate(value if isinstance(value, tuple) else ()):
        _range(field, item, _join(key, number), faults)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    at_least, above, at_most = (field.metadata.get(name) for name in ("at_least", "above", "at_most"))
    if at_least is not None and not value >= at_least:
        faults.append(Fault(key=key, problem=f"is {value}", hint=f"at least {at_least}"))
    if above is not None and not value > above:
        faults.append(Fault(key=key, problem=f"is {value}", hint=f"above {above}"))
    if at_most is not None and not value <= at_most:
        faults.append(Fault(key=key, problem=f"is {value}", hint=f"at most {at_most}"))
