"""The memory of predictions: what a batch takes, and what has no place."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from sousbatch.errors import PlanError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import Lengths, TensorFacts
from sousbatch.recipes.plan import Plan
from sousbatch.recipes.schema import Predict, Resources, StageSpec

LAYERS = 80
BILLIONS = 70.0
HIDDEN = 8192


def plan(small: ModuleType, *, predict: Predict | None = None, **resources: Any) -> Plan:
    """Return the plan of predicting with a model of 70 billion parameters in bfloat16."""
    side = int((BILLIONS * 1e9 / LAYERS) ** 0.5)
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(LAYERS)]
    tensors = [TensorFacts(name=name, shape=(side, side), dtype="bfloat16") for name in names]
    config = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 64, "num_key_value_heads": 8}
    model = replace(
        small.MODEL,
        tensors=tuple(tensors),
        num_params=LAYERS * side * side,
        config={**config, "vocab_size": 32000, "dtype": "bfloat16"},
    )
    lengths = Lengths(
        stage="predict",
        use="predict",
        split="test",
        limit=None,
        num_rows=50,
        num_examples=50,
        longest=1000,
        longest_kept=1000,
    )
    recipe = replace(
        small.RECIPE,
        stages={"predict": StageSpec()},
        resources={"default": Resources(**resources)},
        predict=predict or Predict(max_new_tokens=24),
    )
    site = replace(small.GPU_SITE, gpus_per_node=8, gpu_memory_bytes=80 * 10**9, memory_bytes=100 * 10**9)
    return compile(recipe, site, replace(small.INPUTS, model=model, lengths=(lengths,)))


def lines(found: Plan) -> dict[str, int]:
    return {line.what: line.num_bytes for line in found.forecast.device["predict"]}


def refusal(small: ModuleType, **given: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plan(small, **given)
    (reason,) = caught.value.reasons
    return reason


def test_weights_and_keys_are_shared_by_the_devices_of_a_task(small: ModuleType) -> None:
    found = lines(plan(small, devices_per_node=4))
    assert found["weights"] == pytest.approx(2 * BILLIONS * 1e9 / 4, rel=0.01)
    rows = 16384 // 1024
    assert found["keys and values"] == 2 * 2 * LAYERS * 8 * (HIDDEN // 64) * rows * 1024 // 4
    each = 2 * 17 * HIDDEN * 1024 + 8 * 32000
    assert found["a batch"] == rows * each


def test_quantised_weights_are_smaller(small: ModuleType) -> None:
    for width, num_bytes in (("4bit", 0.5), ("8bit", 1.0)):
        predict: Any = Predict(max_new_tokens=24, load_in=width, batch_tokens=1)
        assert lines(plan(small, predict=predict))["weights"] == pytest.approx(num_bytes * BILLIONS * 1e9, rel=0.01)


def test_a_model_without_a_place_is_refused_with_what_gives_it_one(small: ModuleType) -> None:
    reason = refusal(small)
    assert (
        "stage 'predict' needs 141 GB a device for its model, and there are 80 GB; set predict.load_in=4bit" in reason
    )
    assert "or resources.predict.devices_per_node=3, or predict.offload=true" in reason
    assert lines(plan(small, devices_per_node=3))["weights"] < 80e9
    offloading = Predict(max_new_tokens=24, offload=True)
    plan(small, predict=offloading)
    assert "devices_per_node=3" in refusal(small, devices_per_node=2)
    few = refusal(small, predict=Predict(dtype="float32", offload=True), tasks=1)
    assert "of host memory" in few
    on_cpu = refusal(small, device="cpu", predict=Predict(dtype="float32"))
    assert "GB on a CPU for its model" in on_cpu
    assert "more memory in resources.predict.memory_gb" in on_cpu


def test_zero3_keeps_offloaded_weights_in_host_memory(small: ModuleType) -> None:
    predict = Predict(engine="zero3", offload=True, max_new_tokens=24)
    assert lines(plan(small, predict=predict, devices_per_node=2))["weights"] == 0
