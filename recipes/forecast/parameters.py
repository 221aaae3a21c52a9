"""Which parameters of a model a train stage trains. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ..plan import ModelFacts, TensorFacts
from ..schema import Recipe
from ..tasks import task_of
from .trainable import is_frozen


@dataclass(frozen=True, kw_only=True)
class Params:
    """Parameters of a model as a train stage sees them, and how many tensors a checkpoint of it holds."""

    trainable: int
    frozen: int
    num_tensors: int


def params_of(recipe: Recipe, model: ModelFacts) -> Params:
    """Return how many parameters train and how many are frozen, adapters included."""
    if recipe.adapter.method == "full":
        frozen = sum(_numel(tensor) for tensor in model.tensors if is_frozen(tensor.name, recipe.model.freeze))
        return Params(trainable=model.num_params - frozen, frozen=frozen, num_tensors=len(model.tensors))
    targets, heads = recipe.adapter.target_modules, task_of(recipe.task).head_modules
    adapted = [tensor for tensor in model.tensors if any(takes_adapter(tensor, target, heads) for target in targets)]
    saved = [
        tensor
        for tensor in model.tensors
        if any(f".{name}." in f".{tensor.name}" for name in recipe.adapter.modules_to_save)
    ]
    trainable = recipe.adapter.rank * sum(sum(tensor.shape) for tensor in adapted) + sum(map(_numel, saved))
    return Params(trainable=trainable, frozen=model.num_params, num_tensors=2 * len(adapted) + len(saved))


def _numel(tensor: TensorFacts) -> int:
    return math.prod(tensor.shape)


def takes_adapter(tensor: TensorFacts, target: str, heads: Collection[str]) -> bool:
    """Say whether *target* gives a linear layer's weight an adapter, by peft's rules.

    A target is the end of a module's path; `all-linear` is every linear layer but the *heads*.
    """
    path = tensor.name.removesuffix(".weight")
    module = path.rsplit(".", 1)[-1]
    if len(tensor.shape) != 2 or "embed" in tensor.name or module in ("wte", "wpe", "shared"):
        return False
    return f".{path}".endswith(f".{target}") or (target == "all-linear" and module not in heads)
