"""Recipes as YAML text, and a limit to what a YAML file may grow to.

Nine aliases of nine aliases of ... fill any memory from one line each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import UsageError
from .schema import Recipe, validate

MAX_NODES = 100_000  # a sweep of a thousand points written out has some ten thousand
_MAX_DEPTH = 100


def to_yaml(recipe: Recipe) -> str:
    """Return *recipe* as YAML text, its name first."""
    return dump({"name": recipe.name, "description": recipe.description} | validate.to_plain(recipe))


def dump(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML text, in their order."""
    import yaml

    return str(yaml.safe_dump(dict(values), allow_unicode=True, sort_keys=False, width=1000))


def check_size(path: Path, text: str) -> None:
    """Refuse a YAML text whose aliases stand for too many or too deep values.

    What is no YAML is left to who reads it.

    Raises:
        UsageError: the text grows beyond the limits.
    """
    import yaml

    try:
        size, height = _extent(text)
    except yaml.YAMLError:
        return
    if size > MAX_NODES or height > _MAX_DEPTH:
        raise UsageError(
            f"{path} is too large: with its aliases written out it has more than {MAX_NODES:,} values, "
            f"or more than {_MAX_DEPTH} levels; write them out, or split it"
        )


def _extent(text: str) -> tuple[int, int]:
    """Return how many values a YAML text stands for, and how deeply they are nested.

    It stops counting beyond the limits.

    From its events, since to compose deep nesting overflows the stack of libyaml.
    """
    import yaml

    endless = (MAX_NODES + 1, _MAX_DEPTH + 1)
    anchors: dict[str, tuple[int, int]] = {}
    open_nodes: list[tuple[int, int, str | None]] = [(0, 0, None)]  # size and height so far, anchor; the document first
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            open_nodes.append((1, 0, event.anchor))
            anchors[event.anchor or ""] = endless  # as long as it is open: what holds itself has no end
            found = (0, 0)
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            size, height, anchor = open_nodes.pop()
            found = anchors[anchor or ""] = (size, height + 1)
        elif isinstance(event, yaml.AliasEvent):
            found = anchors.get(event.anchor or "", (1, 1))
        elif isinstance(event, yaml.ScalarEvent):
            found = anchors[event.anchor or ""] = (1, 1)
        else:
            continue
        size, height, anchor = open_nodes[-1]
        size, height = size + found[0], max(height, found[1])
        open_nodes[-1] = (size, height, anchor)
        if size > MAX_NODES or len(open_nodes) + height > _MAX_DEPTH:
            return endless
    return open_nodes[0][:2]


@contextmanager
def limited_files() -> Iterator[None]:
    """Check the size of each file that Hydra opens meanwhile.

    Only its own reading of defaults lists says which files these are.
    """
    from omegaconf import OmegaConf

    real = OmegaConf.load

    def load(file: str | Path | IO[Any]) -> Any:
        path = Path(str(getattr(file, "name", file)))
        if path.is_file():
            check_size(path, path.read_text(encoding="utf-8"))
        return real(file)

    OmegaConf.load = staticmethod(load)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        OmegaConf.load = staticmethod(real)  # type: ignore[method-assign]
