"""DeepSpeed's configuration as the recipe says it."""

from __future__ import annotations

from typing import Any

import pytest

from sousbatch.jobs.training.engines.deepspeed import arguments, config_of
from sousbatch.recipes.engines.deepspeed_config import KNOWN
from sousbatch.recipes.schema import Model, Recipe, Train, Zero

FIXED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1_000_000_000,
}
IN_HOST_MEMORY = {"device": "cpu", "pin_memory": True}
NEITHER = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
CASES: dict[str, tuple[Zero, str, dict[str, Any]]] = {
    "stage 1 in bfloat16": (
        Zero(stage=1),
        "bfloat16",
        NEITHER | {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    ),
    "stage 2 in float16, optimizer in host memory": (
        Zero(stage=2, offload="optimizer"),
        "float16",
        NEITHER | {"zero_optimization": {"stage": 2, "offload_optimizer": IN_HOST_MEMORY}, "fp16": {"enabled": True}},
    ),
    "stage 3 in float32, parameters in host memory too": (
        Zero(stage=3, offload="both"),
        "float32",
        NEITHER
        | {
            "zero_optimization": {"stage": 3, "offload_optimizer": IN_HOST_MEMORY, "offload_param": IN_HOST_MEMORY},
        },
    ),
    "the recipe's own keys win, key by key": (
        Zero(
            stage=3,
            config={
                "zero_optimization": {"reduce_bucket_size": 5, "stage": 2},
                "steps_per_print": 10,
                "bf16": {"enabled": True},
                "comms_logger": {"enabled": True},
            },
        ),
        "float32",
        NEITHER
        | {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 5},
            "steps_per_print": 10,
            "bf16": {"enabled": True},
            "comms_logger": {"enabled": True},
        },
    ),
}


def _recipe(zero: Zero, precision: Any) -> Recipe:
    return Recipe(name="r", model=Model(path="m"), train=Train(zero=zero, precision=precision))


@pytest.mark.parametrize(("zero", "precision", "expected"), CASES.values(), ids=CASES)
def test_the_configuration_follows_stage_offload_and_precision(
    zero: Zero, precision: str, expected: dict[str, Any]
) -> None:
    assert config_of(_recipe(zero, precision)) == FIXED | expected


@pytest.mark.parametrize(("device", "is_given"), [("cpu", True), ("gpu", False)])
def test_on_a_cpu_the_trainer_takes_the_process_group_that_was_started(device: str, is_given: bool) -> None:
    found = arguments(_recipe(Zero(stage=1), "bfloat16"), device)
    assert found["accelerator_config"] == {"use_configured_state": is_given}


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()} <= KNOWN
