"""What planning knows of each generation engine.

Its runtime half is the module that the record names, which only the jobs import. A third-party engine is an entry
point of the group `sousbatch.generation_engines`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import Fault
from ..plugins import Registry
from .model_kinds import ModelKind, fails_loaded_in_half, is_unshardable, max_positions, mixes_beams
from .tasks import task_of

if TYPE_CHECKING:
    from .facts import Inputs
    from .plan import Stage
    from .schema import Predict, StageSettings

WEIGHTS_SHARE = 0.85  # of a device's memory, where a model is dealt out; the rest is for what it computes
_VLLM_HOTTEST = 2.0  # vllm.SamplingParams refuses a higher temperature


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """The properties of an engine. Reading them imports nothing of the engine.

    *version* is raised when the same settings give other text; *decides* lists the settings that decide it. *runtime*
    is a module whose `load` returns the engine, as `jobs.generation.load_engine` calls it. *kinds* are those of the
    models that it can load. An engine that *spans_devices* spreads one model over all devices of its task. It needs
    *package* where the jobs run. *options* are the keys that not every engine has; *faults* yields what else it cannot
    do.
    """

    name: str
    version: int
    decides: tuple[str, ...]
    runtime: str
    kinds: tuple[ModelKind, ...] = ("decoder",)
    can_search_beams: bool = False
    can_keep_logprobs: bool = False
    spans_devices: bool = False
    package: str | None = None
    options: tuple[str, ...] = ()
    faults: Callable[[Predict], Iterator[Fault]] | None = None


def _vllm_faults(predict: Predict) -> Iterator[Fault]:
    instead = "leave it out, or set predict.engine=transformers"
    if predict.no_repeat_ngram:
        problem = "is beyond vllm, which lets n-grams appear again"
        yield Fault(key="predict.no_repeat_ngram", problem=problem, hint=f"{instead}; or use repetition_penalty")
    if predict.sample and predict.temperature > _VLLM_HOTTEST:
        problem = f"is {predict.temperature:g}, and vllm draws up to {_VLLM_HOTTEST:g}"
        yield Fault(key="predict.temperature", problem=problem, hint="lower it, or set predict.engine=transformers")


TRANSFORMERS = EngineSpec(
    name="transformers",
    version=5,  # padding counts in no n-gram
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
    spans_devices=True,
    options=("load_in", "offload"),
)
ZERO3 = replace(
    TRANSFORMERS,
    name="zero3",
    runtime="sousbatch.jobs.generation.zero3_engine",
    kinds=("decoder",),
    options=("offload",),
)
VLLM = EngineSpec(
    name="vllm",
    version=2,
    decides=(
        *("predict.max_new_tokens", "predict.min_new_tokens", "predict.repetition_penalty", "predict.stop"),
        *("predict.stop_ids", "predict.keep_logprobs"),
        *("predict.sample", "predict.temperature", "predict.top_k", "predict.top_p", "seed"),
        "predict.vllm.max_tokens",  # longer prompts are cut
    ),
    runtime="sousbatch.jobs.generation.vllm_engine",
    can_keep_logprobs=True,
    spans_devices=True,
    package="vllm",
    options=("vllm",),
    faults=_vllm_faults,
)
OWN_ENGINES = {name: f"recipes.generation:{name.upper()}" for name in ("transformers", "vllm", "zero3")}
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
    if engine.faults is not None:
        yield from engine.faults(predict)
    owners: dict[str, list[str]] = {}
    for other in map(ENGINES.load, OWN_ENGINES):
        for name in other.options:
            owners.setdefault(name, []).append(other.name)
    for name in owners.keys() - set(engine.options):
        if getattr(predict, name) != getattr(type(predict)(), name):
            problem = f"is for engine {' or '.join(owners[name])}, and predict.engine is {engine.name}"
            yield Fault(key=f"predict.{name}", problem=problem, hint=f"leave it out, or set {key}={owners[name][0]}")


def engine_of(settings: StageSettings) -> EngineSpec:
    """Return the engine of a stage.

    A task that generates no text has its model by transformers.
    """
    return ENGINES.load(settings.predict.engine) if task_of(settings.task).generates else TRANSFORMERS


def spans_devices(settings: StageSettings) -> bool:
    """Return whether a predict stage spreads its model over several devices."""
    return engine_of(settings).spans_devices


def engine_refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Yield why an engine cannot work with the Python, devices or model it gets."""
    settings, wanted = stage.settings, stage.resources
    beams = settings.predict.num_beams or 1
    if beams > 1 and "predict" in stage.splits and mixes_beams(inputs.model.config):
        model_type = inputs.model.config["model_type"]
        yield f"predict.num_beams is {beams}, and beams mix up what a {model_type} remembers; set predict.num_beams=1"
    if stage.record.leaves != "predictions":
        return
    engine, versions = engine_of(settings), inputs.versions
    if engine.package and versions and engine.package not in versions:
        yield (
            f"predict.engine is {engine.name}, and the Python of the jobs has no package {engine.package}: pip install "
            f"{engine.package} there, name another Python in environment.python, or set predict.engine=transformers"
        )
    if settings.predict.dtype not in (None, "float32") and fails_loaded_in_half(inputs.model.config):
        yield (
            f"predict.dtype {settings.predict.dtype} fails on a {inputs.model.config['model_type']} (transformers "
            "5.23); leave it out"
        )
    if engine.name == ZERO3.name and is_unshardable(inputs.model.config):
        model_type = inputs.model.config["model_type"]
        yield f"predict.engine zero3 fails on a {model_type} (transformers 5.23); set predict.engine=transformers"
    if engine.name == TRANSFORMERS.name:
        yield from _loading_refusals(stage, versions)
    if engine.name != VLLM.name:
        return
    if VLLM.name in versions and ("cpu" in versions[VLLM.name]) != (wanted.device == "cpu"):
        device, other = ("CPUs", "gpu") if wanted.device == "cpu" else ("GPUs", "cpu")
        yield (
            f"predict.engine is vllm, whose version {versions[VLLM.name]} was not built for {device}; set "
            f"resources.{stage.name}.device={other}, install vLLM for {device}, or set predict.engine=transformers"
        )
    positions, most = max_positions(inputs.model.config), settings.predict.vllm.max_tokens
    if positions is not None and most is not None and most > positions:
        yield (
            f"predict.vllm.max_tokens is {most:,} and the model has {positions:,} positions; set "
            f"predict.vllm.max_tokens={positions}, or leave it out"
        )


def _loading_refusals(stage: Stage, versions: Mapping[str, str]) -> Iterator[str]:
    predict = stage.settings.predict
    if predict.load_in and versions and "bitsandbytes" not in versions:
        yield (
            f"predict.load_in {predict.load_in} needs bitsandbytes, which the Python of the jobs has not: pip install "
            "bitsandbytes there, or leave it out"
        )
    if predict.load_in and predict.offload:
        yield (
            f"predict.offload keeps no weights of predict.load_in {predict.load_in}, which stay on their device; leave "
            f"one out, or give it more devices in resources.{stage.name}.devices_per_node"
        )
    if predict.offload and stage.resources.device == "cpu":
        yield "predict.offload has no meaning on a CPU, where all is in host memory; set predict.offload=false"
