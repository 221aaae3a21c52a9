"""Engines that generate text: one record each, and what every engine can do.

A new engine is a record here and a module with `load`, which returns an Engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ...errors import UsageError

if TYPE_CHECKING:
    from ...recipes.schema import StageSettings


class Engine(Protocol):
    """A loaded model that continues prompts."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config."""

    def generate(self, prompts: Sequence[list[int]], positions: Sequence[int]) -> list[str]:
        """Return what follows each prompt of token ids.

        *positions* are those of the rows, which seed the drawing. A text depends on its own prompt and position alone,
        not on the prompts that are generated with it.
        """


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The properties of an engine. This module imports without the engine.

    *version* is raised when the same settings give other text; *decides* lists the settings that decide it.
    """

    name: str
    version: int
    decides: tuple[str, ...]
    module: str


ENGINES: dict[str, EngineSpec] = {
    engine.name: engine
    for engine in (
        EngineSpec(
            name="transformers",
            version=1,
            decides=(
                *("predict.max_new_tokens", "predict.min_new_tokens", "predict.num_beams"),
                *("predict.sample", "predict.temperature", "predict.top_k", "predict.top_p", "seed"),
                *("predict.repetition_penalty", "predict.no_repeat_ngram"),
                *("predict.length_ratio", "predict.chunk_tokens", "predict.stop"),
                "model.attention",  # kernels round differently
            ),
            module=f"{__name__}.transformers_engine",
        ),
    )
}


def engine_of(name: str) -> EngineSpec:
    """Return the engine called *name*."""
    if name not in ENGINES:
        raise UsageError(f"predict.engine {name!r} is not built in this version; known: {', '.join(ENGINES)}")
    return ENGINES[name]


def load_engine(
    settings: StageSettings, model_dir: Path, tokenizer: Any, *, model_class: str, device: str, dtype: str
) -> Engine:
    """Return the engine of the settings, with the model of *model_dir* on *device*."""
    module = import_module(engine_of(settings.predict.engine).module)
    loaded = module.load(settings, model_dir, tokenizer, model_class=model_class, device=device, dtype=dtype)
    return cast("Engine", loaded)
