"""The parameters of a model that a train stage trains. Pure."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...files import digest_of
from ..facts import ModelFacts, TensorFacts
from ..schema import StageSettings
from ..schema.validate import to_plain
from ..tasks import task_of

_LAYERS = re.compile(r"layers:(?P<first>\d+)(-(?P<last>\d+))?")
_LAYER_IN_NAME = re.compile(r"\.(?:layers|layer|h|block|blocks)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Params:
    """Parameters of a model as a train stage sees them.

    QLoRA holds *quantisable* of the frozen ones in four bits. A checkpoint of it holds *num_tensors*.
    """

    trainable: int
    frozen: int
    quantisable: int
    num_tensors: int


def deciding_settings(settings: StageSettings) -> dict[str, Any]:
    """Return the settings that decide what trains of a model, as plain values."""
    left_out = ("path", "revision", "tokenizer", "from_scratch", "attention")
    model = {key: value for key, value in to_plain(settings.model).items() if key not in left_out}
    checkpointing = {"gradient_checkpointing": settings.train.gradient_checkpointing}
    return {"task": settings.task, "model": model, "adapter": to_plain(settings.adapter), "train": checkpointing}


def training_key(settings: StageSettings) -> str:
    """Return the key of a training in `ModelFacts.trained`."""
    return digest_of(deciding_settings(settings))


def merge_bytes(settings: StageSettings, model: ModelFacts) -> int:
    """Return the bytes that peft needs to merge an adapter: the model in float32.

    Return 0 where the merge is streamed. The merged model also lies on the disk for a while.
    """
    found = model.trained.get(training_key(settings))
    return 4 * model.num_params if found is not None and found.merges_in_memory else 0


def params_of(settings: StageSettings, model: ModelFacts) -> Params:
    """Return how many parameters train and how many are frozen, adapters included.

    They are counted where the model was built with these settings, and estimated for any others.
    """
    found = model.trained.get(training_key(settings))
    if found is not None:
        return Params(
            trainable=found.trainable,
            frozen=found.frozen,
            quantisable=found.quantisable,
            num_tensors=found.num_tensors,
        )
    if settings.adapter.method == "full":
        frozen = sum(_numel(tensor) for tensor in model.tensors if is_frozen(tensor.name, settings.model.freeze))
        return Params(trainable=model.num_params - frozen, frozen=frozen, quantisable=0, num_tensors=len(model.tensors))
    task, targets = task_of(settings.task), settings.adapter.target_modules
    heads = task.head_modules
    adapted = [tensor for tensor in model.tensors if any(takes_adapter(tensor, target, heads) for target in targets)]
    whole = {*settings.adapter.modules_to_save, *(heads if task.has_new_head else ())}  # peft trains a new head so
    saved = [tensor for tensor in model.tensors if any(f".{name}." in f".{tensor.name}" for name in whole)]
    trainable = settings.adapter.rank * sum(sum(tensor.shape) for tensor in adapted) + sum(map(_numel, saved))
    if settings.adapter.dora:
        trainable += sum(tensor.shape[0] for tensor in adapted)  # a length for each output
    return Params(
        trainable=trainable,
        frozen=model.num_params,
        quantisable=quantisable_of(settings, model),
        num_tensors=(2 + settings.adapter.dora) * len(adapted) + len(saved),
    )


def quantisable_of(settings: StageSettings, model: ModelFacts) -> int:
    """Return how many parameters quantisation makes smaller.

    They are those of the linear layers.
    """
    heads = task_of(settings.task).head_modules
    return sum(_numel(tensor) for tensor in model.tensors if takes_adapter(tensor, "all-linear", heads))


def layer_numbers(model: ModelFacts) -> tuple[int, str]:
    """Return how many numbers a layer computes for a token, and the formula.

    They are 17 h (Korthikanti et al. 2022, eq. 2: 34 s b h bytes at 16 bits). A gated layer (Llama and its kin) has
    10 h + 4 i: three at either norm, query, key, value and their answer; gate, its SiLU, up, and their product.
    """
    config = model.config
    hidden = next((int(config[name]) for name in ("hidden_size", "n_embd", "d_model") if config.get(name)), 0)
    if any("gate_proj" in tensor.name or "gate_up_proj" in tensor.name for tensor in model.tensors):
        inner = int(config.get("intermediate_size") or 0)
        return 10 * hidden + 4 * inner, f"10 x {hidden} + 4 x {inner}"
    return 17 * hidden, f"17 x {hidden}"


def _numel(tensor: TensorFacts) -> int:
    return math.prod(tensor.shape)


def takes_adapter(tensor: TensorFacts, target: str, heads: Collection[str]) -> bool:
    """Say whether *target* gives a linear layer's weight an adapter, by peft's rules.

    `all-linear` is every linear layer but the *heads*; see `is_target` for the others.
    """
    path = tensor.name.removesuffix(".weight")
    module = path.rsplit(".", 1)[-1]
    if len(tensor.shape) != 2 or "embed" in tensor.name or module in ("wte", "wpe", "shared"):
        return False
    return is_target(path, target) or (target == "all-linear" and module not in heads)


def is_pattern(target: str) -> bool:
    """Say whether a target is a regular expression, and no name."""
    return re.fullmatch(r"[\w.-]+", target) is None


def is_target(path: str, target: str) -> bool:
    """Say whether *target* means the module at *path*: its end, or a pattern of all."""
    if is_pattern(target):
        return re.fullmatch(target, path) is not None
    return f".{path}".endswith(f".{target}")


def missing_layers(pattern: str, names: Iterable[str]) -> str:
    """Say which layer of a span *names* lack, "" where they have all of them."""
    span = _LAYERS.fullmatch(pattern)
    numbers = [int(found[1]) for name in names if (found := _LAYER_IN_NAME.search(f".{name}"))]
    last = int(span["last"] or span["first"]) if span else 0
    if span is None or not numbers or last <= max(numbers):
        return ""
    return f"{pattern!r} names layer {last}, and the model's layers are 0 to {max(numbers)}"


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Say whether the parameter called *name* is frozen by one of *patterns*.

    A pattern is a shell pattern over the whole name, layers:FIRST-LAST, or layers:ONE.
    """
    layer = _LAYER_IN_NAME.search(f".{name}")
    for pattern in patterns:
        span = _LAYERS.fullmatch(pattern)
        if span and layer and int(span["first"]) <= int(layer[1]) <= int(span["last"] or span["first"]):
            return True
        if fnmatch.fnmatchcase(name, pattern):
            return True
    return False
