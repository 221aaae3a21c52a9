"""Parse overrides of the command line, in Hydra's form, and lay them over values.

Hydra's grammar takes few signs without quotes: neither `대화` nor `!`. Signs that mean nothing in it are spelt in
letters while it parses, in keys and in values, and are themselves again in what it gives back.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Fault, nearest
from .catalog import search_dirs
from .plan import Axis
from .stage_kinds import USUAL_KINDS

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# What means something in Hydra's grammar, besides letters, digits and '_'. Parentheses do behind its functions only.
_MEANT = set("_ \t.,:=()[]{}'\"\\/-+$%*@?|")
_FUNCTIONS = "bool choice extend_list float glob int interval json_str range shuffle sort str tag".split()
_GROUPING = re.compile(rf"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\b(?:{"|".join(_FUNCTIONS)})\s*\(|[()=]""", re.DOTALL)
_APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")
_BEFORE_QUOTE = re.compile(r'(\\*)("|$)')  # where alone a backslash means something in Hydra's quotes
_SPELT = re.compile("Qz([0-9a-f]+)zQ")
_SPACE = re.compile(r"=\s*(?:choice|range|interval|int|tag)\s*\(")
_NO_GLOB = "glob() stands for files of a group; name the values, as in key=a,b"

_WINS_OVER = {
    "train.epochs": "train.steps",
    "train.schedule.period_epochs": "train.schedule.period_steps",
    "train.schedule.warmup_ratio": "train.schedule.warmup_steps",
    "checkpoints.every_epochs": "checkpoints.every_steps",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One override: its key, and its value, or that the key is taken away."""

    text: str
    key: str
    value: Any
    is_delete: bool


def parse(overrides: Sequence[str], faults: list[Fault]) -> list[Change]:
    """Return the overrides that are well formed; add a fault for each other one."""
    parsed: list[Change] = []
    for text in overrides:
        item = _parsed(text)
        if item is None:
            faults.append(Fault(key=text, problem="is not an override", hint=_advice(text)))
        elif item.is_sweep_override():
            in_quotes = f", and a text with a comma in quotes: {_quoted(text)}" if " " in text else ""
            hint = f"a list is written [a,b]{in_quotes}"
            faults.append(Fault(key=text, problem="has several values", hint=hint))
        else:
            key, value = (_read_back(part) for part in (item.key_or_group, item.value()))
            parsed.append(Change(text=text, key=key, value=value, is_delete=item.is_delete()))
    return parsed


def axes(texts: Sequence[str], faults: list[Fault]) -> list[list[str]]:
    """Return the overrides of one value of each of a sweep's *texts*.

    A text is such as `seed=1,2` or `seed=range(1,4)`.
    """
    found = list[list[str]]()
    for text in texts:
        item = _parsed(text)
        if item is None:
            faults.append(Fault(key=text, problem="is no axis of a sweep", hint=_advice(text)))
        elif _is_glob(item):
            faults.append(Fault(key=text, problem="is no axis of a sweep", hint=_NO_GLOB))
        elif not item.is_sweep_override() or not item.is_discrete_sweep():
            hint = "write key=value,value or key=range(1,4); an override of one value stands before --sweep"
            faults.append(Fault(key=text, problem="is no axis of a sweep", hint=hint))
        else:
            key = item.get_key_element()
            found.append([str(_read_back(f"{key}={value}")) for value in item.sweep_string_iterator()])
    return found


def spaces(texts: Sequence[str], faults: list[Fault]) -> list[Axis]:
    """Return what a search may give the key of each text.

    The words are those of Hydra's Optuna sweeper. A text is such as `seed=1,2`, `adapter.rank=range(4,65,4)`,
    `train.weight_decay=interval(0,0.1)`, `train.steps=int(interval(50,200))` or `train.learning_rate=tag(log,
    interval(1e-5,1e-3))`.
    """
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep

    found = list[Axis]()
    for text in texts:
        item = _parsed(text)
        if item is None or not item.is_sweep_override():
            is_value = item is None and "=" in text and not _SPACE.search(text)
            hint = _advice(text) if is_value else "write key=a,b, key=range(low,high,step) or key=interval(low,high)"
            faults.append(Fault(key=text, problem="is nothing to search", hint=hint))
            continue
        if _is_glob(item):
            faults.append(Fault(key=text, problem="is nothing to search", hint=_NO_GLOB))
            continue
        key, space = _read_back(item.get_key_element()), item._value
        if any(axis.key == key for axis in found):
            faults.append(Fault(key=text, problem="is the second space of its key", hint="give each key one space"))
        if unknown := sorted(set(getattr(space, "tags", ())) - {"log"}):
            faults.append(Fault(key=text, problem=f"has the tag {unknown[0]}", hint="a search knows the tag log"))
        is_log = "log" in getattr(space, "tags", ())
        if isinstance(space, IntervalSweep):
            low, high = space.start or 0, space.end or 0
            is_whole = isinstance(low, int) and isinstance(high, int)  # as int() around it makes them
            step = 1 if is_whole else None
            axis = Axis(key=key, low=float(low), high=float(high), step=step, is_log=is_log)
        elif (
            isinstance(space, RangeSweep) and isinstance(values := space.range(), range) and values.step > 0 and values
        ):
            step = 1 if is_log else values.step
            axis = Axis(key=key, low=float(values[0]), high=float(values[-1]), step=step, is_log=is_log)
        else:
            choices = dict.fromkeys(str(_read_back(value)) for value in item.sweep_string_iterator())
            axis = Axis(key=key, choices=tuple(choices))
        if len(axis.choices) == 1:
            faults.append(Fault(key=text, problem="has one value", hint="write it as an override, without --search"))
        if not axis.choices and (axis.low >= axis.high or (is_log and axis.low <= 0)):
            hint = "the lower end comes first, and with the tag log both are above 0"
            faults.append(Fault(key=text, problem="has nothing between its ends", hint=hint))
        found.append(axis)
    return found


def _is_glob(item: Override) -> bool:
    from hydra.core.override_parser.types import Glob

    return isinstance(item._value, Glob)


def _parsed(text: str) -> Override | None:
    """Return what Hydra reads of an override, None where it is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(_spell(text))
    except HydraException:
        return None


def _spell(text: str) -> str:
    """Return *text* with the signs that Hydra's grammar lacks spelt in letters."""
    key, sign, value = text.partition("=")
    opened: list[bool] = []  # whether each open parenthesis is that of a function

    def grouping(match: re.Match[str]) -> str:
        found = match[0]
        if found == "=":
            return found if any(opened) else _spelt(found)
        if found == ")":
            return found if opened and opened.pop() else _spelt(found)
        if found.endswith("("):
            opened.append(found != "(")
            return found if opened[-1] else _spelt(found)
        return found  # quoted

    if not value.startswith(("'", '"')):
        value = _APOSTROPHE.sub(_spelt("'"), value)
    sigil = key[: len(key) - len(key.lstrip("~+"))]
    return sigil + _spelt_foreign(key[len(sigil) :]) + sign + _spelt_foreign(_GROUPING.sub(grouping, value))


def _spelt_foreign(text: str) -> str:
    return "".join(sign if sign in _MEANT or (sign.isascii() and sign.isalnum()) else _spelt(sign) for sign in text)


def _spelt(sign: str) -> str:
    return f"Qz{ord(sign):x}zQ"


def _read_back(value: Any) -> Any:
    """Return *value* with every spelt sign as itself again."""
    if isinstance(value, str):
        return _SPELT.sub(lambda match: chr(int(match[1], 16)), value)
    if isinstance(value, Mapping):
        return {_read_back(key): _read_back(item) for key, item in value.items()}
    return [_read_back(item) for item in value] if isinstance(value, list) else value


def _advice(text: str) -> str:
    """Say how an override that cannot be read would be right."""
    key, sign, value = text.partition("=")
    if not sign:
        return "write key=value, or ~key to take a key away"
    if not key.strip("~+ ") or " " in key.strip():
        return f"what stands before '=' is a key, such as data.prompt, and not {key!r}"
    opening = value[:1]
    if opening in ("[", "{") and ("]" if opening == "[" else "}") not in value:
        return f"{opening!r} begins a {'list' if opening == '[' else 'mapping'} and nothing ends it"
    return "put quotes around a value with braces, brackets, commas or quotes: " + _quoted(text)


def _quoted(text: str) -> str:
    """Return an override with quotes around its value, as a shell takes it."""
    key, _, value = text.partition("=")
    inner = _BEFORE_QUOTE.sub(lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value.strip("\"'"))
    return shlex.quote(f'{key}="{inner}"')


def split_groups(parsed: Sequence[Change], folder: Path, faults: list[Fault]) -> tuple[list[str], list[Change]]:
    """Return overrides that choose a group's file, such as adapter=lora, and others.

    Groups are looked for beside the recipe, in *folder*, and in the search folders.
    """
    groups, others = [], []
    for item in parsed:
        known, value = files_of_group(item.key, folder), item.value
        if not known or not isinstance(value, str):
            others.append(item)
        elif value in known:
            groups.append(f"{item.key}={value}")
        else:
            problem = f"is unknown; known: {', '.join(sorted(known))}"
            faults.append(Fault(key=f"{item.key}={value}", problem=problem, hint=nearest(value, known)))
    return groups, others


def files_of_group(group: str, folder: Path) -> set[str]:
    """Return the names of a group's files, in *folder* and the search folders."""
    places = [place / group for place in (folder, *search_dirs())] if "." not in group else []
    return {file.stem for place in places if place.is_dir() for file in place.glob("*.yaml")}


def without_effect(values: Mapping[str, Any], items: Sequence[Change]) -> Iterator[Fault]:
    """Yield the overrides beside which the recipe gives a key that wins over them."""
    given = {item.key for item in items}
    for item in items:
        winner = _WINS_OVER.get(item.key)
        if winner is None or winner in given or item.is_delete or item.value is None:
            continue
        place: Any = values
        for name in winner.split("."):
            place = place.get(name) if isinstance(place, Mapping) else None
        if place is not None:
            problem, hint = f"has no effect: the recipe gives {winner}={place}, which wins", f"add {winner}=null"
            yield Fault(key=item.text, problem=problem, hint=hint)


def lay_over(values: dict[str, Any], item: Change, faults: list[Fault]) -> None:
    """Lay one override over *values*; what it goes below is made when it is missing."""
    *parents, last = item.key.split(".")
    if parents[:1] == ["stages"] and not values.get("stages"):
        values["stages"] = {kind: {} for kind in USUAL_KINDS}  # the usual ones become the recipe's own
    place = values
    for number, name in enumerate(parents):
        if place.get(name) is None:
            place[name] = {}
        if not isinstance(place[name], dict):
            key = ".".join(parents[: number + 1])
            hint = f"{key} is {place[name]!r}, which has no keys"
            faults.append(Fault(key=item.text, problem="goes too deep", hint=hint))
            return
        place = place[name]
    if not item.is_delete:
        place[last] = item.value
    elif last in place:
        del place[last]
    else:
        hint = nearest(last, place) or "what is not given has its default"
        faults.append(Fault(key=item.text, problem="takes away what the recipe does not give", hint=hint))
