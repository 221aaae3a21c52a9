"""Plan for DeepSpeed's ZeRO: optimizer states, gradients, parameters are sharded.

Model states after Rajbhandari et al. 2020 (ZeRO, table 1): the float32 masters are kept beside the
working copy, with the two moments. What the exchange adds was measured (benchmarks/memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...checkpoints.formats.tensors import DTYPES, FloatDtype
from ...checkpoints.sizes import StateBytes
from ..facts import ModelFacts
from ..forecast.parameters import Params
from ..model_kinds import is_unshardable
from ..optimizers import takes_roots
from ..plan import Batch, ForecastLine
from ..schema import StageSettings
from .base import Device, Exchange, ModelStates, StatePart
from .deepspeed_config import config_refusals


def working_dtype(settings: StageSettings) -> FloatDtype:
    """Return the training's precision; DeepSpeed keeps the float32 masters itself."""
    return settings.train.precision


def model_states(settings: StageSettings, world_size: int, moment_bytes: float) -> ModelStates:
    """Return the parts, each shared by the ranks from its ZeRO stage on."""
    zero, work = settings.train.zero, DTYPES[settings.train.precision].num_bytes

    def held(bytes_per_param: float, shared_from: int, in_host_memory: bool = False) -> StatePart:
        shared_by = world_size if zero.stage >= shared_from else 1
        return StatePart(bytes_per_param=bytes_per_param, shared_by=shared_by, in_host_memory=in_host_memory)

    return ModelStates(
        weights=held(work, 3, zero.offload == "both"),
        gradients=held(work, 2),
        optimizer=held(4 + moment_bytes, 1, zero.offload != "none"),
    )


def exchange(settings: StageSettings, params: Params, batch: Batch, device: Device) -> Exchange:
    """Return buckets of gradients, gathered weights, and a rank's share of the step.

    A GPU holds a bucket of its full size, also where fewer parameters train; a CPU only what was written to. The step
    makes a rank's gradients float32. What a forward pass gathered under ZeRO-3 stays as long as its activations, beside
    what is gathered for the backward pass (measured: benchmarks/memory.py).
    """
    zero, work, ranks = settings.train.zero, DTYPES[settings.train.precision].num_bytes, batch.world_size
    sharding = zero.config.get("zero_optimization", {})
    full = int(sharding.get("reduce_bucket_size", 5e8))
    reduced = min(params.trainable, full)
    share = -(-params.trainable // ranks) if zero.offload == "none" else 0
    bucket = _line("gradient buckets", work, full if device == "gpu" else reduced)
    step = _line("step", 8 if takes_roots(settings, device) else 4, share)
    if zero.stage < 3:
        held, after = ((bucket,), (step,)) if device == "gpu" else ((), (bucket, step))
        return Exchange(held=held, after=after, gradients_stay=batch.accumulation > 1)
    live = min(params.trainable + params.frozen, int(sharding.get("stage3_max_live_parameters", 1e9)))
    backward = _line("backward", work, reduced + reduced // ranks)
    after = (max(step, backward, key=lambda line: line.num_bytes),)
    gathered = _line("gathered weights", work, live)
    return Exchange(
        held=(gathered, bucket),
        before=(replace(gathered, what="weights of the forward pass"),),
        after=after,
        gradients_stay=True,
    )


def _line(what: str, width: int, count: int) -> ForecastLine:
    return ForecastLine(what=what, num_bytes=width * count, formula=f"{width} B x {count:,}")


def state_bytes(settings: StageSettings, world_size: int, moment_bytes: float) -> StateBytes:
    """Return what all ranks write.

    ZeRO 1 and 2 add the working copy, and each ZeRO-3 rank lists all tensors.
    """
    work = DTYPES[settings.train.precision].num_bytes
    if settings.train.zero.stage == 3:
        note = f"4 B master + {moment_bytes:.3g} B moments"
        return StateBytes(trainable=4 + moment_bytes, note=note, frozen=work, num_lists=world_size)
    note = f"4 B master + {moment_bytes:.3g} B moments + {work} B working copy"
    return StateBytes(trainable=4 + moment_bytes + work, note=note, frozen=work, num_lists=1)


def refusals(settings: StageSettings, model: ModelFacts) -> Iterator[str]:
    """Refuse what DeepSpeed cannot train, or would train wrongly."""
    yield from config_refusals(settings)
    train, zero = settings.train, settings.train.zero
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((model.config[name] for name in names if model.config.get(name)), None)
    if settings.adapter.method == "qlora" and zero.stage == 3 and experts:
        yield (
            f"adapter qlora with train.zero.stage 3 fails on a mixture of {experts} experts: ZeRO-3 waits for "
            "experts that got no token; set train.zero.stage=2, or adapter=lora"
        )
    if zero.stage == 3 and is_unshardable(model.config):
        yield (
            f"train.zero.stage 3 fails on a {model.config['model_type']} (transformers 5.23); set train.zero.stage=2"
        )
    if settings.adapter.method == "qlora" and settings.adapter.dora and zero.stage == 3:
        yield (
            "adapter.dora over 4-bit weights fails with train.zero.stage 3: peft reads them past the sharding; "
            "set train.zero.stage=2, adapter=lora or adapter.dora=false"
        )
    if zero.offload == "both" and zero.stage != 3:
        yield (
            "train.zero.offload both moves parameters to host memory, which only train.zero.stage=3 shards; set "
            "train.zero.offload=optimizer"
        )
    if not train.master_weights:
        yield (
            "train.master_weights=false is not supported with ZeRO, which keeps float32 masters and shares them among "
            "the ranks; set train.master_weights=true or train.zero.stage=0"
        )
