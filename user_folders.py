"""The user's own folders.

There lie runs, state, cached values and the defaults of a site.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import files

_CACHE_FORMAT = 3


def runs_dir(given: str | None) -> Path:
    """Return the folder that holds all runs.

    It is *given*, else $SOUSBATCH_RUNS, else ./runs.
    """
    return Path(given or os.environ.get("SOUSBATCH_RUNS") or "runs").expanduser().resolve()


def state_dir() -> Path:
    """Return the user's private state folder.

    It is $SOUSBATCH_STATE, else XDG's place for it.
    """
    given = os.environ.get("SOUSBATCH_STATE")
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(given) if given else Path(base) / "sousbatch"


def cache_dir() -> Path:
    """Return the folder for what can be made again.

    It is $SOUSBATCH_CACHE, else XDG's place for it.
    """
    given = os.environ.get("SOUSBATCH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "sousbatch"


def cached(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Return the remembered value of *key*, or make and remember it.

    Key and value are plain JSON values.
    """
    value = recall(kind, key)
    if value is None:
        value = make()
        remember(kind, key, value)
    return value


def recall(kind: str, key: Any) -> Any:
    """Return the remembered value of *key*, None where there is none."""
    try:
        return files.read_json(_cache_file(kind, key))
    except (OSError, ValueError):
        return None


def remember(kind: str, key: Any, value: Any) -> None:
    """Remember the plain JSON *value* of *key*."""
    path = _cache_file(kind, key)
    files.make_private_dir(path.parent)
    files.write_json(path, value)


def _cache_file(kind: str, key: Any) -> Path:
    return cache_dir() / kind / f"{files.digest_of([_CACHE_FORMAT, key])}.json"


def config_file() -> Path:
    """Return the user's defaults for a site.

    They are $SOUSBATCH_CONFIG, else XDG's place for it.
    """
    given = os.environ.get("SOUSBATCH_CONFIG")
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(given) if given else Path(base) / "sousbatch" / "config.yaml"
