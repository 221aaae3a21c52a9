"""What a config says of its model: its kind, its positions, and the tasks that it fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from sousbatch.recipes.model_kinds import kind_of, max_positions
from sousbatch.recipes.tasks import advise_task, misfit, task_of

KINDS = {
    **dict.fromkeys(("llama", "gpt2", "mixtral", "qwen2", "gemma"), "decoder"),
    **dict.fromkeys(("bert", "roberta", "electra", "modernbert", "deberta-v2", "xlnet", "bert-generation"), "encoder"),
    **dict.fromkeys(("bart", "t5", "mt5", "mbart", "led", "pegasus", "marian"), "encoder-decoder"),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_the_kind_of_a_model_is_known_by_its_type(model_type: str) -> None:
    assert kind_of({"model_type": model_type}) == KINDS[model_type]
    assert kind_of(AutoConfig.for_model(model_type).to_dict()) == KINDS[model_type]


def test_a_decoder_in_an_encoders_architecture_is_a_decoder() -> None:
    assert kind_of({"model_type": "bert", "is_decoder": True}) == "decoder"
    assert kind_of({"model_type": "own", "is_encoder_decoder": True}) == "encoder-decoder"


def test_every_text_model_that_fills_gaps_is_known_as_an_encoder() -> None:
    others = {"modernvbert", "neomme", "esmc", "ultrabert", "ultravbert", "reformer"}  # seen, or seldom trained
    for model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - others:
        assert kind_of({"model_type": model_type}) != "decoder", model_type


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "t5", "n_positions": 512}, None),
        ({"model_type": "bart", "max_position_embeddings": 1024}, 1024),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 99}}, 99),
        ({"model_type": "led", "max_encoder_position_embeddings": 4096, "max_decoder_position_embeddings": 64}, 64),
    ],
)
def test_a_model_takes_as_many_tokens_as_it_has_positions(config: dict[str, Any], most: int | None) -> None:
    assert max_positions(config) == most


def test_a_model_of_another_kind_is_told_the_task_that_fits() -> None:
    task = task_of("causal_lm")
    assert misfit(task, {"model_type": "llama"}) is None
    assert misfit(dataclasses.replace(task, kinds=()), {"model_type": "t5"}) is None
    said = misfit(dataclasses.replace(task, name="other", kinds=("encoder",)), {"model_type": "llama"})
    assert said == "is a decoder (llama), and task other takes an encoder"
    assert advise_task({"model_type": "llama"}) == (
        "set task=causal_lm or task=classification or task=question_answering"
    )
    assert advise_task({"model_type": "llama"}, lambda task: task.name == "causal_lm") == "set task=causal_lm"
    assert advise_task({"model_type": "whisper", "is_encoder_decoder": True}, lambda task: False) == (
        "take another model"
    )
