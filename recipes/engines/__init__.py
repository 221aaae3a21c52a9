"""Plan with sharding engines.

What an engine does on the ranks is in `jobs.training.engines`, by the same name.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..schema import StageSettings
from . import ddp, deepspeed
from .base import Engine

ENGINES: Mapping[str, Engine] = {"ddp": ddp, "deepspeed": deepspeed}


def engine_name(settings: StageSettings) -> str:
    """Return the name of the engine that trains *settings*; nobody else decides it."""
    return "deepspeed" if settings.train.zero.stage else "ddp"


def engine_of(settings: StageSettings) -> Engine:
    """Return the planning half of the engine that trains *settings*."""
    return ENGINES[engine_name(settings)]
