"""Run sharding engines on the ranks.

What planning knows of an engine is in `recipes.engines`, by the same name.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....recipes.engines import engine_name
from ....recipes.schema import StageSettings
from . import ddp, deepspeed
from .base import Engine

ENGINES: Mapping[str, Engine] = {"ddp": ddp, "deepspeed": deepspeed}


def engine_of(settings: StageSettings) -> Engine:
    """Return the engine that trains *settings*."""
    return ENGINES[engine_name(settings)]
