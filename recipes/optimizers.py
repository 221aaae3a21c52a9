"""Describe each optimizer: the bytes that it holds, and where it works.

How a job makes one is in `jobs.training.trainer`. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .facts import ModelFacts, TensorFacts
from .forecast.parameters import Params, is_frozen
from .plan import Stage
from .schema import StageSettings

_SMALL = 4096  # bitsandbytes keeps the states of smaller tensors in 32 bits, and transformers those of embeddings
_EIGHT_BITS = 2 + 2 * 4 / 256  # two moments, and a float32 scale of each for every 256 numbers


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """The facts of one optimizer.

    *argument* is transformers' name for it, or MODULE:CLASS of one that transformers does not know. States that follow
    the weights have their dtype; others are float32, or 8-bit integers where it *is_eight_bit*.
    """

    argument: str
    follows_weights: bool = False
    is_eight_bit: bool = False
    is_factored: bool = False
    needs_gpu: bool = False
    package: str | None = None
    shards: bool = True  # whether it can work on ZeRO's flat pieces of tensors


OPTIMIZERS: Mapping[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(argument="adamw_torch", follows_weights=True),
    "adamw_fused": OptimizerSpec(argument="adamw_torch_fused", follows_weights=True),
    "adamw_8bit": OptimizerSpec(argument="adamw_bnb_8bit", is_eight_bit=True, package="bitsandbytes"),
    "paged_adamw": OptimizerSpec(argument="paged_adamw_32bit", needs_gpu=True, package="bitsandbytes"),
    "paged_adamw_8bit": OptimizerSpec(
        argument="paged_adamw_8bit", is_eight_bit=True, needs_gpu=True, package="bitsandbytes"
    ),
    "fused_adam": OptimizerSpec(argument="deepspeed.ops.adam:FusedAdam", follows_weights=True, needs_gpu=True),
    "cpu_adam": OptimizerSpec(argument="deepspeed.ops.adam:DeepSpeedCPUAdam"),
    "adafactor": OptimizerSpec(argument="adafactor", is_factored=True, shards=False),
}


def moment_bytes(settings: StageSettings, model: ModelFacts, params: Params) -> float:
    """Return the mean bytes of the optimizer's states for a parameter that trains."""
    spec, width = OPTIMIZERS[settings.train.optimizer], 4
    if spec.follows_weights and not settings.train.master_weights:
        width = 2
    if not (spec.is_eight_bit or spec.is_factored) or not params.trainable:
        return 2.0 * width
    if settings.train.zero.stage:  # one flat tensor
        return _EIGHT_BITS
    if settings.adapter.method != "full":
        if spec.is_factored:
            return 4 / settings.adapter.rank
        return _EIGHT_BITS if params.trainable >= _SMALL * params.num_tensors else 8.0
    trained = [tensor for tensor in model.tensors if not is_frozen(tensor.name, settings.model.freeze)]
    held = _factored if spec.is_factored else _eight_bit
    return sum(map(held, trained)) / max(1, sum(math.prod(tensor.shape) for tensor in trained))


def takes_roots(settings: StageSettings, device: str) -> bool:
    """Return whether a step holds the roots of all second moments at once.

    torch's AdamW does on a GPU, where it works on many tensors together.
    """
    return device == "gpu" and settings.train.optimizer == "adamw"


def _eight_bit(tensor: TensorFacts) -> float:
    """Return the bytes that bitsandbytes holds for a tensor."""
    numel, is_embedding = math.prod(tensor.shape), any(name in tensor.name for name in ("embed", "wte", "wpe"))
    return numel * (8 if is_embedding or numel < _SMALL else _EIGHT_BITS)


def _factored(tensor: TensorFacts) -> float:
    """Return Adafactor's bytes: a mean for each row and column, no first moment."""
    return 4.0 * (sum(tensor.shape) if len(tensor.shape) == 2 else math.prod(tensor.shape))


def optimizer_refusals(stage: Stage, versions: Mapping[str, str]) -> Iterator[str]:
    """Yield why the optimizer of a train stage cannot work there.

    *versions* are those of the job's packages; none where they are not known.
    """
    train, is_cpu = stage.settings.train, stage.resources.device == "cpu"
    name, spec = train.optimizer, OPTIMIZERS[train.optimizer]
    offload, is_held = train.zero.offload, bool(spec.package or spec.needs_gpu)
    if spec.package and versions and spec.package not in versions:
        yield f"train.optimizer {name} needs the package {spec.package}: pip install {spec.package}"
    if spec.needs_gpu and is_cpu:
        instead = "adamw_8bit" if spec.is_eight_bit else "adamw"
        yield f"train.optimizer {name} works on a GPU only; set train.optimizer={instead}"
    if train.zero.stage and not spec.shards:
        yield (
            f"train.optimizer {name} is not supported with ZeRO here; set train.optimizer=adamw or train.zero.stage=0"
        )
    if offload != "none" and is_held:
        yield (
            f"train.optimizer {name} keeps its states on the GPU, and train.zero.offload {offload} in host memory; set "
            "train.optimizer=cpu_adam or train.zero.offload=none"
        )
    elif "offload" in train.on_out_of_memory and is_held:
        yield (
            f"train.on_out_of_memory has offload, and train.optimizer {name} keeps its states on the GPU; set "
            "train.optimizer=adamw or train.on_out_of_memory=[micro_batch,gradient_checkpointing]"
        )
    if name == "cpu_adam" and offload == "none" and not is_cpu:
        yield (
            "train.optimizer cpu_adam needs train.zero.offload; set train.optimizer=adamw or "
            "train.zero.offload=optimizer"
        )
    if not train.master_weights and name == "cpu_adam":
        yield (
            "train.optimizer cpu_adam works on float32 masters; set train.master_weights=true or train.optimizer=adamw"
        )
