"""Forecasts against sums made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import pytest

from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import Lengths, TensorFacts
from sousbatch.recipes.forecast.memory import device_memory, forecast
from sousbatch.recipes.forecast.parameters import params_of, takes_adapter
from sousbatch.recipes.plan import Batch
from sousbatch.recipes.schema import Adapter, Model, Predict, Train, Zero

BATCH = Batch(
    world_size=4, micro_batch=2, accumulation=1, steps=100, steps_per_epoch=10, warmup_steps=0, save_every_steps=10
)


def _memory(small: ModuleType, **sections: Any) -> dict[str, int]:
    lines = device_memory(replace(small.RECIPE, **sections), small.MODEL, BATCH, "cpu")
    return {line.what: line.num_bytes for line in lines}


def test_a_quantised_base_takes_half_a_byte(small: ModuleType) -> None:
    found = _memory(small, adapter=Adapter(method="qlora", rank=1, target_modules=("q_proj",)), train=Train())
    layers, factors = 2 * (8 * 8 + 8 * 16), 2 * 16
    assert found["weights"] == layers // 2 + 4 * (904 - layers) + 4 * factors


def test_activations_are_summed_over_layers(small: ModuleType) -> None:
    tokens, hidden, logits = 2 * 32, 8, 12 * 2 * 32 * 32
    assert _memory(small)["activations"] == 2 * 17 * 4 * tokens * hidden + logits
    eager = _memory(small, model=Model(attention="eager"))["activations"]
    assert eager == _memory(small)["activations"] + 2 * 5 * 2 * 32 * 32 * 2 * 2


def test_activations_are_those_of_the_longest_row_that_is_trained_or_measured(small: ModuleType) -> None:
    uses: tuple[Literal["train", "eval"], ...] = ("train", "eval")

    def planned(*longest: int) -> int:
        lengths = [
            Lengths(
                stage="train",
                use=use,
                split="train",
                limit=32,
                num_rows=9,
                num_examples=9,
                longest=9,
                longest_kept=kept,
            )
            for use, kept in zip(uses, longest, strict=False)
        ]
        plan = compile(small.RECIPE, small.SITE, replace(small.INPUTS, lengths=tuple(lengths)))
        (found,) = (line for line in plan.forecast.device["train"] if line.what == "activations")
        return int(re.search(r"\d+ x (\d+) tokens", found.formula)[1])

    assert (planned(), planned(7, 5), planned(7, 11), planned(32, 5)) == (32, 7, 11, 32)


def test_encoder_and_decoder_each_have_their_layers_and_tokens(small: ModuleType) -> None:
    config = {"is_encoder_decoder": True, "d_model": 8, "encoder_layers": 3, "decoder_layers": 1, "vocab_size": 32}
    data = replace(small.RECIPE.data, max_tokens=32, max_target_tokens=10)
    lines = device_memory(
        replace(small.RECIPE, task="seq2seq", data=data), replace(small.MODEL, config=config), BATCH, "cpu"
    )
    encoder, decoder, logits = 3 * 17 * 32, 22 * 10 + 2 * 32, 12 * 10 * 32
    assert lines[-1].num_bytes == 2 * (4 * 8 * (encoder + decoder) + logits)


def test_recomputing_keeps_one_layer_and_the_inputs(small: ModuleType) -> None:
    train = replace(small.RECIPE.train, gradient_checkpointing=True)
    tokens, logits = 2 * 32 * 8, 12 * 2 * 32 * 32
    assert _memory(small, train=train)["activations"] == 17 * 4 * tokens * 3 // 2 + 2 * 4 * tokens + logits


@pytest.mark.parametrize(
    ("name", "shape", "target", "takes"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), "q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), "self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), "proj", False),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), "all-linear", True),
        ("lm_head.weight", (32, 8), "all-linear", False),
        ("lm_head.weight", (32, 8), "lm_head", True),
        ("model.embed_tokens.weight", (32, 8), "all-linear", False),
        ("model.norm.weight", (8,), "all-linear", False),
    ],
)
def test_adapters_go_where_peft_puts_them(name: str, shape: tuple[int, ...], target: str, takes: bool) -> None:
    assert takes_adapter(TensorFacts(name=name, shape=shape, dtype="float32"), target, ["lm_head"]) is takes


def test_an_adapter_trains_rank_times_both_sides(small: ModuleType) -> None:
    recipe = replace(small.RECIPE, adapter=Adapter(method="lora", rank=4, modules_to_save=("lm_head",)))
    found = params_of(recipe, small.MODEL)
    assert (found.trainable, found.frozen) == (4 * (2 * (8 + 16) + 2 * (8 + 8)) + 32 * 8, 904)


def test_frozen_layers_do_not_train(small: ModuleType) -> None:
    for layer in ("layers:0-0", "layers:0"):
        recipe = replace(small.RECIPE, model=Model(path="m", freeze=(layer, "*embed*")))
        assert params_of(recipe, small.MODEL).frozen == 8 * 16 + 8 * 8 + 32 * 8


def test_predictions_are_held_twice_while_they_are_merged(small: ModuleType) -> None:
    plan = compile(replace(small.RECIPE, predict=Predict(rows=20, max_new_tokens=10)), small.SITE, small.INPUTS)
    (line, _) = forecast(small.INPUTS, [plan.stage("predict")]).storage
    assert line.num_bytes == 2 * 20 * (100 + 4 * 10)


def test_the_peak_is_the_sum_of_the_lines(small: ModuleType) -> None:
    found = small.plan().forecast
    assert found.storage_peak_bytes == sum(line.num_bytes for line in found.storage)


def test_gradients_take_the_place_of_activations_unless_they_stay_for_another_forward_pass(small: ModuleType) -> None:
    recipe = replace(small.RECIPE, train=Train(zero=Zero(stage=0)))
    first = {line.what: line for line in device_memory(recipe, small.MODEL, BATCH, "cpu")}
    assert (first["gradients"].num_bytes, first["gradient buckets"].num_bytes) == (0, 4 * 904)
    assert first["gradients"].formula == "4 B x 904, not at the peak"
    again = replace(BATCH, accumulation=2)
    found = {line.what: line.num_bytes for line in device_memory(recipe, small.MODEL, again, "cpu")}
    assert found["gradients"] == 4 * 904 and found["activations"] == first["activations"].num_bytes


def test_small_activations_count_less_than_the_gradients_after_them(small: ModuleType) -> None:
    data, train = replace(small.RECIPE.data, max_tokens=1), Train(zero=Zero(stage=0))
    settings = replace(small.RECIPE, data=data, train=train)
    lines = {line.what: line for line in device_memory(settings, small.MODEL, replace(BATCH, micro_batch=1), "gpu")}
    assert lines["gradients"].num_bytes == lines["step"].num_bytes == 4 * 904  # the step: roots of the second moments
    assert lines["activations"].num_bytes == 0 and lines["activations"].formula.endswith(", not at the peak")


def test_a_gpu_holds_a_whole_bucket_where_few_parameters_train(small: ModuleType) -> None:
    settings = replace(small.RECIPE, train=Train(zero=Zero(stage=2), precision="bfloat16"))
    lines = {line.what: line.num_bytes for line in device_memory(settings, small.MODEL, BATCH, "gpu")}
    assert lines["gradient buckets"] == 2 * 500_000_000
