"""Propose settings of a training that fit devices, memory and disk. Pure.

Each proposal is a plan that compiles at the site, and whose forecast leaves a margin: what is proposed is never what
the forecast then refuses. Its cost is an estimate that ranks proposals, and no promise of seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ..checkpoints.formats.tensors import DTYPES
from ..cluster.site import Site
from ..errors import PlanError
from .compile import compile
from .facts import Inputs, ModelFacts
from .forecast.memory import as_read, host_memory
from .forecast.parameters import params_of
from .plan import Plan, Stage
from .reference import differences
from .refusals import node_memory, rank_memory
from .schema import Recipe
from .stages import ResolvedStage, resolve_stages

METHODS = ("full", "lora", "qlora")  # from what takes most to what takes least
# Held for what forecasts do not count: their error, fragments of freed memory, and the libraries of a rank.
_MARGIN = 1.10
_LIBRARY_BYTES = {"gpu": 1_500_000_000, "cpu": 700_000_000}
_ABOUT = 1.15  # less memory than that saved is no reason to pay more
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)

# Speeds of one device behind the estimate of cost: those of an A100 at 40 % of its peak, behind PCIe 4. Only their
# ratios matter, since all proposals are for the same devices.
_FLOPS = 1.2e14
_EXCHANGE_BYTES_S = 25e9
_HOST_BYTES_S = 12e9
_HOST_ADAM_PARAMS_S = 1e9
_TOKENS_OF_HALF_SPEED = 512  # a forward pass of so few tokens uses half of a device
_DEQUANTISING = 1.39  # QLoRA beside LoRA, measured by S. Raschka, "Practical Tips for Finetuning LLMs Using LoRA", 2023


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Settings that fit, as overrides, with what they take.

    Memory is that of the rank and the node that hold most, in bytes, margin included; 0 there is unknown. *cost* is the
    GPU time for a token, beside full training of the same model without sharding, in batches that fill the device.
    """

    overrides: tuple[str, ...]
    plan: Plan
    memory_bytes: int
    memory_there: int
    host_bytes: int
    host_there: int
    cost: float


def propose(variants: Mapping[str, tuple[Recipe, Inputs]], site: Site) -> list[Proposal]:
    """Return what fits, the cheapest first.

    A proposal that another one beats in cost and memory is left out. *variants* are the recipe and its inputs by
    method of adapter, the recipe as it was given first.

    Raises:
        PlanError: nothing fits; it says what comes nearest, or why no setting compiles.
    """
    found: list[Proposal] = []
    misses: list[Proposal] = []
    reasons: dict[str, None] = {}
    given, _ = next(iter(variants.values()))
    if not _train_stages(given):
        raise PlanError(["no stage of the recipe trains, so there is nothing to fit"])
    for method, (recipe, inputs) in variants.items():
        wide = _on_all_devices(recipe, site)
        for held in _ways_to_hold(wide, method):
            fitting = None
            for micro_batch in _micro_batches(wide):
                changed = _changed(wide, {**held, "train.micro_batch": micro_batch})
                try:
                    one = _proposal(given, changed, compile(changed, site, inputs))
                except PlanError as error:
                    reasons |= dict.fromkeys(error.reasons)
                    break
                if one.memory_bytes > one.memory_there or one.host_bytes > one.host_there:
                    misses.append(one)
                    break
                fitting = one  # larger micro batches take more, and cost less
            found += [fitting] if fitting else []
    if not found:
        raise PlanError([_nearest_miss(misses)] if misses else list(reasons))
    found.sort(key=lambda one: (one.cost, one.memory_bytes))
    return [one for place, one in enumerate(found) if not any(_beats(other, one) for other in found[:place])]


def _beats(other: Proposal, one: Proposal) -> bool:
    """Say whether *other*, which costs no more, needs about the same memory.

    Both train the same weights.
    """
    is_same = other.plan.recipe.adapter.method == one.plan.recipe.adapter.method
    return is_same and other.memory_bytes <= one.memory_bytes * _ABOUT and other.host_bytes <= one.host_bytes * _ABOUT


def _nearest_miss(misses: Sequence[Proposal]) -> str:
    least = min(misses, key=lambda one: one.memory_bytes + one.host_bytes)
    if not least.memory_there:
        return (
            f"the memory of a GPU of {least.plan.site.name} is unknown; write it into the file of your defaults, by "
            "type of GPU or by partition, such as gpu_memory_gb: {a100: 40}"
        )
    need = f"{least.memory_bytes / 1e9:.3g} GB a rank where there are {least.memory_there / 1e9:.3g} GB"
    if least.host_bytes > least.host_there:
        need += f" and {least.host_bytes / 1e9:.3g} GB of host memory where there are {least.host_there / 1e9:.3g} GB"
    return (
        f"nothing fits: the least needs {need} ({' '.join(least.overrides)}); take more or larger devices, a smaller "
        "model, or a lower data.max_tokens"
    )


def _train_stages(recipe: Recipe) -> list[ResolvedStage]:
    return [stage for stage in resolve_stages(recipe).values() if stage.kind.leaves == "checkpoints"]


def _ranks(stage: ResolvedStage) -> int:
    return stage.resources.nodes * stage.resources.devices_per_node


def _on_all_devices(recipe: Recipe, site: Site) -> Recipe:
    """Return *recipe* with the GPUs of a node that share the global batch.

    A training that asks for several GPUs of a node, and no more than it has, keeps them.
    """
    resources = dict(recipe.resources)
    for stage in _train_stages(recipe):
        partition, wanted = site.partition(stage.resources.partition), stage.resources
        most = max((kind.gpus for kind in partition.nodes), default=0) if partition else site.gpus_per_node
        if wanted.device == "gpu" and most and not 1 < wanted.devices_per_node <= most:
            batch = stage.settings.train.global_batch
            sharing = [number for number in range(1, most + 1) if batch % (wanted.nodes * number) == 0]
            resources[stage.name] = replace(wanted, devices_per_node=max(sharing, default=most))
    return replace(recipe, resources=resources)


def _ways_to_hold(recipe: Recipe, method: str) -> Iterator[dict[str, object]]:
    """Yield each useful way to spread the training's memory, as values of keys."""
    stages = _train_stages(recipe)
    is_alone = max(map(_ranks, stages), default=1) == 1
    is_cpu = any(stage.resources.device == "cpu" for stage in stages)
    for zero, offload, recomputes in product((0, 1, 2, 3), ("none", "optimizer", "both"), (False, True)):
        is_useless = (
            (is_cpu and offload != "none")
            or (offload == "optimizer" and zero < 2)
            or (offload == "both" and zero < 3)
            or (is_alone and zero and offload == "none")  # there is nobody to share with
        )
        if not is_useless:
            yield {
                "adapter.method": method,
                "train.zero.stage": zero,
                "train.zero.offload": offload,
                "train.gradient_checkpointing": recomputes,
            }


def _micro_batches(recipe: Recipe) -> Iterator[int]:
    """Yield what the global batch can be cut into.

    It is 1 where it cannot, which compiling refuses.
    """
    ranks = max(map(_ranks, _train_stages(recipe)), default=1)
    yield from [size for size in _MICRO_BATCHES if recipe.train.global_batch % (ranks * size) == 0] or [1]


def _changed(section: Any, values: Mapping[str, object]) -> Any:
    """Return nested dataclasses with the *values* of dotted keys."""
    changes: dict[str, object] = {}
    inner: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = value
        else:
            changes[name] = value
    changes |= {name: _changed(getattr(section, name), found) for name, found in inner.items()}
    return replace(section, **changes)


def _proposal(given: Recipe, changed: Recipe, plan: Plan) -> Proposal:
    """Return the proposal of a plan.

    Its overrides turn the *given* recipe into the *changed* one.
    """
    stages = [stage for stage in plan.stages if stage.batch is not None]
    memory = [(_memory(stage, plan), rank_memory(stage, plan.site)) for stage in stages]
    host = [(_host_memory(stage, plan), node_memory(stage, plan.site)) for stage in stages]
    (memory_bytes, memory_there), (host_bytes, host_there) = max(memory), max(host)
    return Proposal(
        overrides=tuple(_overrides(given, changed)),
        plan=plan,
        memory_bytes=memory_bytes,
        memory_there=memory_there,
        host_bytes=host_bytes,
        host_there=host_there,
        cost=max(
            estimate_cost(replace(stage, settings=as_read(stage, plan.inputs)), plan.inputs.model) for stage in stages
        ),
    )


def _overrides(given: Recipe, changed: Recipe) -> Iterator[str]:
    for before, after in zip(_train_stages(given), _train_stages(changed), strict=True):
        if before.resources != after.resources:
            yield f"resources.{after.name}.devices_per_node={after.resources.devices_per_node}"
    for key, _, value in differences(given, replace(changed, resources=given.resources)):
        yield f"{key}={str(value).lower()}"


def _memory(stage: Stage, plan: Plan) -> int:
    found = sum(line.num_bytes for line in plan.forecast.device[stage.name])
    return int(found * _MARGIN) + _LIBRARY_BYTES[stage.resources.device]


def _host_memory(stage: Stage, plan: Plan) -> int:
    """Return what the ranks of a node hold in host memory.

    That of ranks on a CPU counts as device memory.
    """
    assert stage.batch is not None, "only trainings offload"
    ranks = stage.resources.devices_per_node * (stage.resources.nodes if plan.site.is_one_machine else 1)
    found = host_memory(stage.settings, plan.inputs.model, stage.batch) * ranks
    return int(found * _MARGIN) + (ranks * _LIBRARY_BYTES["cpu"] if stage.resources.device == "gpu" else 0)


def estimate_cost(stage: Stage, model: ModelFacts) -> float:
    """Return the GPU time for a token beside full training that exchanges nothing.

    A pass forward costs 2 operations a parameter and token, one backward 2 for the activations and 2 for each parameter
    that trains (Kaplan et al. 2020, table 1); recomputation adds a pass forward. ZeRO-1 exchanges as much as plain data
    parallelism, ZeRO-2 reduces at each micro batch, ZeRO-3 gathers the weights twice more (Rajbhandari et al. 2020, 7).
    """
    settings, batch = stage.settings, stage.batch
    assert batch is not None, "only a training is estimated"
    train, params = settings.train, params_of(settings, model)
    weights, width = params.trainable + params.frozen, DTYPES[train.precision].num_bytes
    tokens = settings.data.max_tokens * batch.micro_batch
    forward = 2 * weights * (_DEQUANTISING if settings.adapter.method == "qlora" else 1)
    operations = forward * (2 + train.gradient_checkpointing) + 2 * params.trainable
    micro_s = operations * (tokens + _TOKENS_OF_HALF_SPEED) / _FLOPS
    step_s = 0.0
    if batch.world_size > 1:
        gradients = width * params.trainable / _EXCHANGE_BYTES_S
        if train.zero.stage < 2:
            step_s += 2 * gradients
        else:
            micro_s += gradients
            step_s += gradients if train.zero.stage == 2 else 0
        micro_s += 2 * width * weights / _EXCHANGE_BYTES_S if train.zero.stage == 3 else 0
    if train.zero.offload != "none":
        share = params.trainable / batch.world_size
        step_s += 2 * width * share / _HOST_BYTES_S + params.trainable / _HOST_ADAM_PARAMS_S
    if train.zero.offload == "both":
        micro_s += 2 * width * weights / batch.world_size / _HOST_BYTES_S
    full_s = 6 * model.num_params * tokens * batch.accumulation / _FLOPS
    return (micro_s * batch.accumulation + step_s) / full_s
