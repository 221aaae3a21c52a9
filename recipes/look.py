"""Two ways of looking that all looks share: collect every reason, and remember what was seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import files
from ..errors import PlanError, UsageError
from ..rundir import cache_dir

_FORMAT = 1


def collect(reasons: list[str], look: Callable[[], Any]) -> Any:
    """Return what *look* sees, or None after adding to *reasons* why it cannot."""
    try:
        return look()
    except PlanError as error:
        reasons += error.reasons
    except UsageError as error:
        reasons.append(str(error))
    return None


def cached(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Return the remembered value of *key*, or make and remember it; both are plain JSON values."""
    path = cache_dir() / kind / f"{files.digest_of([_FORMAT, key])}.json"
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        pass
    value = make()
    files.make_private_dir(path.parent)
    files.write_json(path, value)
    return value
