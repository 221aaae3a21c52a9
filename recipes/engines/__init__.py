"""Sharding engines, the half that plans; what runs on the ranks is in `jobs.training.engines`, by the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..schema import Recipe
from . import ddp, deepspeed
from .base import Engine

EngineName = Literal["ddp", "deepspeed"]

ENGINES: Mapping[EngineName, Engine] = {"ddp": ddp, "deepspeed": deepspeed}


def engine_name(recipe: Recipe) -> EngineName:
    """Return the name of the engine that trains *recipe*: the one place that decides it."""
    return "deepspeed" if recipe.train.zero.stage else "ddp"


def engine_of(recipe: Recipe) -> Engine:
    """Return the planning half of the engine that trains *recipe*."""
    return ENGINES[engine_name(recipe)]
