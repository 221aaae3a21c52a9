"""What planning knows of each sharding engine: memory of a rank and bytes of a checkpoint beside real ones."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sousbatch.checkpoints.sizes import Size, checkpoint_size
from sousbatch.errors import PlanError
from sousbatch.recipes import engines
from sousbatch.recipes.compile import compile
from sousbatch.recipes.engines import engine_name, engine_of
from sousbatch.recipes.engines.deepspeed_config import config_refusals
from sousbatch.recipes.forecast.memory import device_memory
from sousbatch.recipes.schema import Model, Recipe, Train, Zero

# Bytes of all files of real checkpoints after one step of jobs.train (torch 2.13, DeepSpeed 0.19.8, peft
# 0.21, transformers 5.23; bfloat16 and two ranks where nothing else is said): a Llama of 349,952
# parameters in 20 tensors, 6 kB of config and tokenizer, and the same at 14.8 M in 74 tensors.
SMALL = {"trainable": 349_952, "frozen": 0, "num_tensors": 20}
LARGE = {"trainable": 14_775_296, "frozen": 0, "num_tensors": 74}
FROZEN = {"trainable": 164_224, "frozen": 185_728, "num_tensors": 20}
LORA = {"trainable": 69_632, "frozen": 349_952, "num_tensors": 28, "adapter": True}
MEASURED: list[tuple[int, dict[str, Any], int, int, str]] = [
    (4_248_438, SMALL, 0, 1, "bfloat16"),
    (4_263_064, SMALL, 0, 2, "bfloat16"),
    (4_263_066, SMALL, 0, 2, "float32"),
    (4_292_284, SMALL, 0, 4, "bfloat16"),
    (4_936_888, SMALL, 1, 1, "bfloat16"),
    (4_956_265, SMALL, 1, 2, "bfloat16"),
    (4_994_922, SMALL, 1, 4, "bfloat16"),
    (5_151_509, SMALL, 1, 12, "bfloat16"),
    (4_936_888, SMALL, 2, 1, "bfloat16"),
    (4_956_264, SMALL, 2, 2, "bfloat16"),
    (5_656_158, SMALL, 2, 2, "float32"),
    (4_994_923, SMALL, 2, 4, "bfloat16"),
    (4_237_639, SMALL, 3, 1, "bfloat16"),
    (4_266_200, SMALL, 3, 2, "bfloat16"),
    (4_266_189, SMALL, 3, 2, "float32"),
    (4_323_292, SMALL, 3, 4, "bfloat16"),
    (4_554_001, SMALL, 3, 12, "bfloat16"),
    (177_416_997, LARGE, 0, 2, "bfloat16"),
    (206_929_775, LARGE, 2, 2, "bfloat16"),
    (177_413_146, LARGE, 3, 2, "bfloat16"),
    (2_769_271, FROZEN, 0, 2, "bfloat16"),
    (2_727_425, FROZEN, 1, 2, "bfloat16"),
    (2_728_897, FROZEN, 2, 2, "bfloat16"),
    (2_414_239, FROZEN, 3, 2, "bfloat16"),
    (914_363, LORA, 0, 2, "bfloat16"),
    (1_034_566, LORA, 1, 2, "bfloat16"),
    (1_034_566, LORA, 2, 2, "bfloat16"),
    (907_716, LORA, 3, 2, "bfloat16"),
    # QLoRA, on the CPU: the base in 4 bits is not in it either
    (915_065, LORA, 0, 2, "bfloat16"),
    (1_035_271, LORA, 1, 2, "bfloat16"),
    (1_035_270, LORA, 2, 2, "bfloat16"),
]


def _recipe(zero_stage: int, precision: str) -> Recipe:
    return Recipe(name="r", model=Model(path="m"), train=Train(precision=precision, zero=Zero(stage=zero_stage)))


def _size(params: dict[str, Any], zero_stage: int, world_size: int, precision: str) -> Size:
    recipe = _recipe(zero_stage, precision)
    return checkpoint_size(
        **{"adapter": False} | params,
        states=engine_of(recipe).state_bytes(recipe, world_size, 8),
        world_size=world_size,
        beside_bytes=6_100,
    )


@pytest.mark.parametrize(("zero_stage", "name"), [(0, "ddp"), (1, "deepspeed"), (2, "deepspeed"), (3, "deepspeed")])
def test_the_zero_stage_decides_the_engine(zero_stage: int, name: str) -> None:
    assert engine_name(_recipe(zero_stage, "bfloat16")) == name


def test_a_row_in_the_table_is_enough_to_be_planned_with(small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = SimpleNamespace(**vars(engines.ddp) | {"refusals": lambda settings, model: iter(["the toy says no"])})
    monkeypatch.setitem(engines.ENGINES, "toy", toy)
    monkeypatch.setattr(engines, "engine_name", lambda settings: "toy")
    with pytest.raises(PlanError, match="the toy says no"):
        compile(small.RECIPE, small.SITE, small.INPUTS)


@pytest.mark.parametrize(("num_bytes", "params", "zero_stage", "world_size", "precision"), MEASURED)
def test_sizes_are_within_two_percent_of_real_checkpoints(
    num_bytes: int, params: dict[str, Any], zero_stage: int, world_size: int, precision: str
) -> None:
    assert _size(params, zero_stage, world_size, precision).num_bytes == pytest.approx(num_bytes, rel=0.02)


def test_64_ranks_cost_their_bookkeeping_and_nothing_else() -> None:
    """From 4 to 12 real ranks 28.8 kB each under ZeRO-3, 19.6 kB under ZeRO-1."""
    for zero_stage, each, measured in ((3, 28_840, 4_554_001), (1, 19_570, 5_151_509)):
        size = _size(SMALL, zero_stage, 64, "bfloat16")
        assert size.num_bytes == pytest.approx(measured + 52 * each, rel=0.02)


# bytes per parameter of weights, gradients and optimizer states on one of 4 ranks
STATES = {
    "no ZeRO": (Zero(stage=0), "bfloat16", (4, 4, 8)),
    "ZeRO-1": (Zero(stage=1), "bfloat16", (2, 2, 3)),
    "ZeRO-2": (Zero(stage=2), "bfloat16", (2, 0.5, 3)),
    "ZeRO-3": (Zero(stage=3), "bfloat16", (0.5, 0.5, 3)),
    "ZeRO-3 in float32": (Zero(stage=3), "float32", (1, 1, 3)),
    "optimizer in host memory": (Zero(stage=2, offload="optimizer"), "float16", (2, 0.5, 0)),
    "parameters in host memory": (Zero(stage=3, offload="both"), "float16", (0, 0.5, 0)),
}


@pytest.mark.parametrize(("zero", "precision", "widths"), STATES.values(), ids=STATES)
def test_model_states_are_those_of_the_zero_paper(
    small: ModuleType, zero: Zero, precision: Any, widths: tuple[float, ...]
) -> None:
    recipe = replace(small.RECIPE, train=Train(zero=zero, precision=precision))
    batch = replace(small.plan().stage("train").batch, world_size=4, accumulation=2)
    found = {line.what: line.num_bytes for line in device_memory(recipe, small.MODEL, batch, "gpu")}
    assert [found[what] / 904 for what in ("weights", "gradients", "optimizer states")] == list(widths)


def _config_refusals(**config: Any) -> list[str]:
    zero = Zero(stage=3, config=config)
    recipe = Recipe(name="r", model=Model(path="m"), train=Train(precision="bfloat16", zero=zero))
    return list(config_refusals(recipe))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_batch_size": 16}, "train_batch_size (16), which train.global_batch decides"),
        ({"gradient_accumulation_steps": 4}, "which train.global_batch decides"),
        ({"fp16": {"enabled": True}}, "fp16.enabled (true), which train.precision decides"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer (a section), which train.optimizer decides"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage (2), which train.zero.stage decides"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "which train.zero.offload decides"),
        ({"zero_optimization": {"stage3_prefetch_buckt_size": 1}}, "does not know (did you mean"),
    ],
)
def test_a_pasted_config_that_says_otherwise_than_the_recipe_is_refused(config: dict[str, Any], said: str) -> None:
    assert said in "; ".join(_config_refusals(**config))


def test_a_pasted_config_that_says_the_same_is_taken() -> None:
    same = {"stage": 3, "stage3_max_live_parameters": 0, "offload_optimizer": {"device": "none"}}
    auto = {"train_batch_size": "auto", "fp16": {"enabled": "auto"}, "bf16": {"enabled": True}}
    assert _config_refusals(zero_optimization=same, wall_clock_breakdown=True, **auto) == []
