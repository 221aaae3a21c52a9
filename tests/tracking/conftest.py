"""A run that is tracked: its identity lies in its tracking folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch.tracking.identity import RunIdentity, write_identity


def make_identity(**changes: Any) -> RunIdentity:
    values: dict[str, Any] = {"recipe": "toy", "run": "0123456789ab", "group": "0123456789ab", "mode": "offline"}
    values |= {"per": "run", "folder": "/runs/toy/0123456789ab", "told": (), "config": {"seed": 2}}
    values |= {"trackers": ("wandb",), "project": "our-project", "entity": None, "tags": ()}
    return RunIdentity(**values | changes)


@pytest.fixture
def tracked(tmp_path: Path) -> Callable[..., Path]:
    """Write the identity of a run and return its tracking folder."""

    def write(**changes: Any) -> Path:
        write_identity(make_identity(**changes), tmp_path / "tracking")
        return tmp_path / "tracking"

    return write
