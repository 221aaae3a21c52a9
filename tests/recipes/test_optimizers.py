"""What planning knows of optimizers: their bytes, beside real ones, and where they cannot work."""

from __future__ import annotations

import typing
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from sousbatch.errors import PlanError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import ModelFacts, TensorFacts
from sousbatch.recipes.forecast.parameters import params_of
from sousbatch.recipes.optimizers import OPTIMIZERS, moment_bytes
from sousbatch.recipes.schema import Adapter, Model, Recipe, Resources, Train, Zero

SHAPES = {"model.embed_tokens.weight": (64, 128), "layers.0.up_proj.weight": (128, 256), "norm.weight": (128,)}
MODEL = ModelFacts(
    folder="/m",
    tokenizer_folder="/m",
    digest="m",
    has_weights=True,
    num_params=64 * 128 + 128 * 256 + 128,
    tensors=tuple(TensorFacts(name=name, shape=shape, dtype="float32") for name, shape in SHAPES.items()),
    config={},
)


def forecast(*, adapter: Adapter | None = None, **train: Any) -> float:
    recipe = Recipe(name="r", model=Model(path="m"), train=Train(**train), adapter=adapter or Adapter())
    return moment_bytes(recipe, MODEL, params_of(recipe, MODEL))


def real_bytes(optimizer: Any) -> int:
    """Return the bytes of an optimizer's own states after one step; constants that tensors share do not count."""
    for parameter in (one for group in optimizer.param_groups for one in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and not name.startswith("qmap") and value.ndim
    ]
    return sum(value.numel() * value.element_size() for value in held)


@pytest.mark.parametrize(
    ("name", "dtype"), [("adamw", torch.float32), ("adamw", torch.bfloat16), ("adamw_8bit", torch.float32)]
)
def test_the_forecast_of_moments_is_what_an_optimizer_holds(name: str, dtype: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES.values()]
    if name == "adamw":
        optimizer: Any = torch.optim.AdamW(weights)
    else:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(weights[1:])
    expected = MODEL.num_params * forecast(optimizer=name, master_weights=dtype == torch.float32)
    if name == "adamw_8bit":  # transformers keeps the embeddings' states in 32 bits
        expected -= 8 * 64 * 128
    assert real_bytes(optimizer) == pytest.approx(expected)


def test_factored_moments_are_a_row_and_a_column() -> None:
    assert forecast(optimizer="adafactor") * MODEL.num_params == pytest.approx(4 * (64 + 128 + 128 + 256 + 128))
    assert forecast(optimizer="adamw_8bit", zero=Zero(stage=2)) == pytest.approx(2.03, abs=0.01)
    assert forecast(optimizer="adamw_8bit", adapter=Adapter(method="lora", rank=2)) == 8  # each factor is small


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "paged": ({"optimizer": "paged_adamw_8bit"}, "works on a GPU only; set train.optimizer=adamw_8bit"),
    "fused by DeepSpeed": ({"optimizer": "fused_adam"}, "works on a GPU only; set train.optimizer=adamw"),
    "factored and ZeRO": ({"optimizer": "adafactor", "zero": Zero(stage=2)}, "is not supported with ZeRO"),
    "tf32": ({"tf32": True}, "train.tf32 has no effect on a CPU; set train.tf32=false"),
    "offload without ZeRO": ({"on_out_of_memory": ("offload",)}, "offload, which needs ZeRO; set train.zero.stage=2"),
    "offload and its own place": (
        {"optimizer": "adamw_8bit", "zero": Zero(stage=2), "on_out_of_memory": ("offload",)},
        "and train.optimizer adamw_8bit keeps its states on the GPU",
    ),
    "fewer tokens": ({"on_out_of_memory": ("max_tokens",)}, "set data.long_rows=cut_right"),
    "pure and ZeRO": ({"master_weights": False, "zero": Zero(stage=1)}, "is not supported with ZeRO"),
    "pure and float32": ({"master_weights": False, "precision": "float32"}, "has no meaning in float32"),
    "pure and compiled": ({"master_weights": False, "optimizer": "cpu_adam"}, "works on float32 masters"),
    "pure and epsilon": ({"master_weights": False, "precision": "float16"}, "set train.epsilon=1e-6"),
}


def _reasons(small: ModuleType, recipe: Recipe, *, versions: dict[str, str] | None = None, site: Any = None) -> str:
    inputs = replace(small.INPUTS, versions=versions or {})
    with pytest.raises(PlanError) as found:
        compile(recipe, site or small.SITE, inputs)
    return "\n".join(found.value.reasons)


@pytest.mark.parametrize(("train", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_when_planning(small: ModuleType, train: dict[str, Any], reason: str) -> None:
    recipe = replace(small.RECIPE, train=Train(**{"global_batch": 8} | train))
    assert reason in _reasons(small, recipe)


def test_packed_rows_are_not_grouped_by_length_nor_shortened(small: ModuleType) -> None:
    train = Train(global_batch=8, group_by_length=True, on_out_of_memory=("max_tokens",))
    found = _reasons(small, replace(small.RECIPE, train=train, data=replace(small.RECIPE.data, packing="rows")))
    assert "set train.group_by_length=false" in found and "makes other examples" in found


def test_an_optimizer_of_a_package_that_jobs_lack_is_refused(small: ModuleType) -> None:
    recipe = replace(small.RECIPE, train=Train(global_batch=8, optimizer="adamw_8bit"))
    assert "needs the package bitsandbytes" in _reasons(small, recipe, versions={"torch": "2"})


def test_flash_attention_that_jobs_lack_or_in_float32_is_refused(small: ModuleType) -> None:
    gpus = {"default": Resources(devices_per_node=1)}
    model, train = (
        replace(small.RECIPE.model, attention="flash_attention_2"),
        Train(global_batch=8, precision="float32"),
    )
    recipe = replace(small.RECIPE, model=model, train=train, resources=gpus)
    said = _reasons(small, recipe, versions={"torch": "2"}, site=small.GPU_SITE)
    assert "needs the package flash-attn" in said and "set train.precision=bfloat16" in said
    assert "needs the package" not in _reasons(small, recipe, versions={"flash_attn": "2"}, site=small.GPU_SITE)


def test_states_are_offloaded_by_an_optimizer_that_works_there(small: ModuleType) -> None:
    gpus = {"default": Resources(devices_per_node=2), "predict": Resources()}
    train = Train(global_batch=8, optimizer="adamw_8bit", zero=Zero(stage=2, offload="optimizer"))
    recipe = replace(small.RECIPE, train=train, resources=gpus)
    assert "set train.optimizer=cpu_adam" in _reasons(small, recipe, site=small.GPU_SITE)
    train = Train(global_batch=8, optimizer="cpu_adam")
    recipe = replace(small.RECIPE, train=train, resources=gpus)
    assert "cpu_adam needs train.zero.offload" in _reasons(small, recipe, site=small.GPU_SITE)


def test_every_optimizer_that_a_recipe_may_name_is_known() -> None:
    assert set(OPTIMIZERS) == set(typing.get_args(typing.get_type_hints(Train)["optimizer"]))
