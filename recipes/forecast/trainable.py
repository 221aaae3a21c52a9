"""Which parameters train: the recipe's patterns against parameter names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

_LAYERS = re.compile(r"layers:(\d+)-(\d+)")
_LAYER_IN_NAME = re.compile(r"\.(?:layers|layer|h|block|blocks)\.(\d+)\.")


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Say whether the parameter called *name* is frozen by one of *patterns*.

    A pattern is a shell pattern over the whole name, or layers:FIRST-LAST.
    """
    layer = _LAYER_IN_NAME.search(f".{name}")
    for pattern in patterns:
        span = _LAYERS.fullmatch(pattern)
        if span and layer and int(span[1]) <= int(layer[1]) <= int(span[2]):
            return True
        if fnmatch.fnmatchcase(name, pattern):
            return True
    return False
