"""Parse overrides of the command line, in Hydra's form, and lay them over values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Fault, nearest
from .catalog import search_dirs
from .stage_kinds import USUAL_KINDS

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def parse(overrides: Sequence[str], faults: list[Fault]) -> list[Override]:
    """Return the overrides that are well formed; add a fault for each other one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            item = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            hint = f"write key=value, and quotes around a value with braces or commas; {reason}"
            faults.append(Fault(key=text, problem="is not an override", hint=hint))
            continue
        if item.is_sweep_override():
            faults.append(Fault(key=text, problem="has several values", hint="a list is written [a,b]"))
            continue
        parsed.append(item)
    return parsed


def axes(texts: Sequence[str], faults: list[Fault]) -> list[list[str]]:
    """Return the overrides of one value of each of a sweep's *texts*.

    A text is such as `seed=1,2` or `seed=range(1,4)`.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, found = OverridesParser.create(), list[list[str]]()
    for text in texts:
        try:
            item = parser.parse_override(text)
            if not item.is_sweep_override() or not item.is_discrete_sweep():
                raise HydraException("it has one value, or a continuous range of them")
            found.append([f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()])
        except HydraException as error:
            hint = f"write key=value,value or key=range(1,4); {str(error).splitlines()[0]}"
            faults.append(Fault(key=text, problem="is no axis of a sweep", hint=hint))
    return found


def split_groups(parsed: Sequence[Override], folder: Path, faults: list[Fault]) -> tuple[list[str], list[Override]]:
    """Return overrides that choose a group's file, such as adapter=lora, and others.

    Groups are looked for beside the recipe, in *folder*, and in the search folders.
    """
    groups, others = [], []
    for item in parsed:
        known = _files_of_group(item.key_or_group, folder)
        value = item.value()
        if not known or not isinstance(value, str):
            others.append(item)
        elif value in known:
            groups.append(f"{item.key_or_group}={value}")
        else:
            problem = f"is unknown; known: {', '.join(sorted(known))}"
            faults.append(Fault(key=f"{item.key_or_group}={value}", problem=problem, hint=nearest(value, known)))
    return groups, others


def _files_of_group(group: str, folder: Path) -> set[str]:
    places = [place / group for place in (folder, *search_dirs())] if "." not in group else []
    return {file.stem for place in places if place.is_dir() for file in place.glob("*.yaml")}


def lay_over(values: dict[str, Any], item: Override, faults: list[Fault]) -> None:
    """Lay one override over *values*; what it goes below is made when it is missing."""
    *parents, last = item.key_or_group.split(".")
    if parents[:1] == ["stages"] and not values.get("stages"):
        values["stages"] = {kind: {} for kind in USUAL_KINDS}  # the usual ones become the recipe's own
    place = values
    for number, name in enumerate(parents):
        if place.get(name) is None:
            place[name] = {}
        if not isinstance(place[name], dict):
            key = ".".join(parents[: number + 1])
            hint = f"{key} is {place[name]!r}, which has no keys"
            faults.append(Fault(key=str(item.input_line), problem="goes too deep", hint=hint))
            return
        place = place[name]
    if not item.is_delete():
        place[last] = item.value()
    elif last in place:
        del place[last]
    else:
        hint = nearest(last, place) or "what is not given has its default"
        faults.append(Fault(key=str(item.input_line), problem="takes away what the recipe does not give", hint=hint))
