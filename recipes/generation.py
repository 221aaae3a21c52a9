"""What planning knows of each generation engine.

Its runtime half is the module that the record names, which only the jobs import. A third-party engine is an entry
point of the group `sousbatch.generation_engines`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import Fault
from ..plugins import Registry
from .model_kinds import ModelKind
from .tasks import task_of

if TYPE_CHECKING:
    from .schema import StageSettings


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The properties of an engine. Reading them imports nothing of the engine.

    *version* is raised when the same settings give other text; *decides* lists the settings that decide it. *runtime*
    is a module whose `load` returns the engine, as `jobs.generation.load_engine` calls it. *kinds* are those of the
    models that it can load. An engine that *spans_devices* spreads one model over all devices of its task.
    """

    name: str
    version: int
    decides: tuple[str, ...]
    runtime: str
    kinds: tuple[ModelKind, ...] = ("decoder",)
    can_search_beams: bool = False
    can_keep_logprobs: bool = False
    spans_devices: bool = False


TRANSFORMERS = EngineSpec(
    name="transformers",
    version=2,  # draws by inverse transform from counters
    decides=(
        *("predict.max_new_tokens", "predict.min_new_tokens", "predict.num_beams"),
        *("predict.sample", "predict.temperature", "predict.top_k", "predict.top_p", "seed"),
        *("predict.repetition_penalty", "predict.no_repeat_ngram", "predict.keep_logprobs"),
        *("predict.stop", "predict.stop_ids"),
        "model.attention",  # kernels round differently
    ),
    runtime="sousbatch.jobs.generation.transformers_engine",
    kinds=("decoder", "encoder-decoder"),
    can_search_beams=True,
    can_keep_logprobs=True,
)
OWN_ENGINES = {"transformers": "recipes.generation:TRANSFORMERS"}
ENGINES: Registry[EngineSpec] = Registry(
    "generation engine", "sousbatch.generation_engines", OWN_ENGINES, of=EngineSpec
)


def engine_faults(settings: StageSettings) -> Iterator[Fault]:
    """Yield what the engine of the settings cannot do of them."""
    predict, key = settings.predict, "predict.engine"
    problem, hint = ENGINES.problem(predict.engine)
    if problem:
        yield Fault(key=key, problem=problem, hint=hint)
        return
    engine, task = ENGINES.load(predict.engine), task_of(settings.task)
    if beyond := set(task.kinds) - set(engine.kinds):
        hint = "set predict.engine=transformers"
        yield Fault(key=key, problem=f"is {engine.name}, which cannot load {task.name}'s {beyond.pop()}s", hint=hint)
    if predict.keep_logprobs and not engine.can_keep_logprobs:
        hint = "leave it out, or set predict.engine=transformers"
        yield Fault(
            key="predict.keep_logprobs", problem=f"is beyond {engine.name}, which does not tell them", hint=hint
        )
    if (predict.num_beams or 1) > 1 and not engine.can_search_beams:
        hint = "leave it out, or set predict.engine=transformers"
        yield Fault(key="predict.num_beams", problem=f"is beyond {engine.name}, which searches no beams", hint=hint)
