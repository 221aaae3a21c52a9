"""Encoder-decoders: the loss, what the decoder reads, and how answers are chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import sousbatch.recipes
from sousbatch.jobs.generation import Prompt
from sousbatch.jobs.generation.transformers_engine import TransformersEngine
from sousbatch.jobs.tasks.seq2seq import PairCollator, token_loss
from sousbatch.recipes.building import prepare_model
from sousbatch.recipes.schema import Data, Predict, StageSettings

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
IDS = {"vocab_size": 169, "pad_token_id": 0, "eos_token_id": 2}
ROWS = [{"input_ids": [5, 6, 7, 2], "labels": [8, 2]}, {"input_ids": [5, 2], "labels": [9, 10, 11, 2]}]
SETTINGS = StageSettings(task="seq2seq", data=Data(), predict=Predict(max_new_tokens=6))


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        config: Any = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **IDS)
        return T5ForConditionalGeneration(config).eval()
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "bos_token_id": 1}
    others = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2}
    if kind == "fsmt":  # it writes into the labels that it shifts
        both = {
            "langs": ["en", "de"],
            "num_beams": 1,
            "src_vocab_size": 169,
            "tgt_vocab_size": 169,
            "pad_token_id": 0,
            "eos_token_id": 2,
        }
        return FSMTForConditionalGeneration(FSMTConfig(**(sizes | heads | others | both))).eval()
    if kind == "m2m_100":
        return M2M100ForConditionalGeneration(M2M100Config(**sizes, **heads, **others, **IDS)).eval()
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **others, **IDS)).eval()


@pytest.fixture(
    scope="module",
    params=["bart", "t5", "fsmt", "m2m_100"],  # the last shifts labels in its forward pass alone
)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def test_a_batch_has_the_decoders_input_as_the_model_shifts_it(model: Any) -> None:
    batch = PairCollator(0, model)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2, -100, -100], [9, 10, 11, 2]]
    start = model.config.decoder_start_token_id
    assert batch["decoder_input_ids"].tolist() == [[start, 8, 2, 0], [start, 9, 10, 11]]


def test_the_loss_is_the_models_own(model: Any) -> None:
    batch = PairCollator(0, model)(ROWS)
    outputs = model(**batch)
    assert torch.allclose(token_loss(outputs, batch["labels"]), outputs.loss, atol=1e-5)


def test_the_loss_of_a_step_is_the_same_however_its_rows_are_batched(model: Any) -> None:
    collate = PairCollator(0, model)
    whole, parts = collate(ROWS), [collate([row]) for row in ROWS]
    num_tokens = (whole["labels"] != -100).sum()
    summed = sum(token_loss(model(**part), part["labels"], num_tokens) for part in parts)
    assert torch.allclose(summed, token_loss(model(**whole), whole["labels"]), atol=1e-5)


def engine(model: Any, **changes: Any) -> TransformersEngine:
    settings = replace(SETTINGS, predict=replace(SETTINGS.predict, **changes))
    return TransformersEngine(settings, model, AutoTokenizer.from_pretrained(TINY))


def test_an_answer_is_what_the_decoder_writes_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token counts: nothing of the prompt is in the output, to be cut off."""
    loaded = engine(model)
    tokens = model.generate(torch.tensor([[5, 6, 2]]), max_new_tokens=6, do_sample=False, num_beams=1)[0]
    expected = AutoTokenizer.from_pretrained(TINY).decode(tokens, skip_special_tokens=True)
    (made,) = loaded.generate([Prompt(ids=[5, 6, 2], row=0, max_new_tokens=6)])
    assert AutoTokenizer.from_pretrained(TINY).decode(made.ids, skip_special_tokens=True) == expected


@pytest.mark.parametrize("beams", [1, 2])
def test_a_decoder_may_have_more_layers_than_its_encoder(beams: int) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 3, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **IDS)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "use_cache": False}
    expected = model.generate(torch.tensor([[5, 6, 2]]), **options)[0, 1:]
    (made,) = engine(model, num_beams=beams).generate([Prompt(ids=[5, 6, 2], row=0, max_new_tokens=6)])
    assert made.ids == [token for token in expected.tolist() if token not in (0, 2)] != []


def test_an_encoder_decoder_keeps_its_own_way_to_generate_where_the_recipe_is_silent() -> None:
    model = make("bart")
    model.generation_config = GenerationConfig(
        forced_bos_token_id=9, num_beams=2, no_repeat_ngram_size=2, length_penalty=2.0, min_length=5, max_length=7,
        decoder_start_token_id=2, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    kept = engine(model)._generation
    assert (kept.forced_bos_token_id, kept.num_beams, kept.no_repeat_ngram_size, kept.length_penalty) == (9, 2, 2, 2.0)
    assert (kept.max_new_tokens, kept.min_length, kept.max_length) == (6, None, None)
    given = engine(model, num_beams=1, no_repeat_ngram=0)._generation
    assert (given.num_beams, given.no_repeat_ngram_size, given.forced_bos_token_id) == (1, 0, 9)
    assert engine(model, sample=True)._generation.num_beams == 1
    assert model.generation_config.num_beams == 2


def test_answers_begin_as_training_does_and_end_with_the_tokenizers_end_too() -> None:
    """The decoder of an mBART reads the last token of a target first: the language, or the end."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 7}
    model = MBartForConditionalGeneration(MBartConfig(**sizes, **heads, **{**IDS, "eos_token_id": 9}))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prepare_model(SETTINGS, model, tokenizer)
    assert model.config.decoder_start_token_id == tokenizer.eos_token_id == 2
    made = engine(model)._generation
    assert (made.decoder_start_token_id, made.eos_token_id) == (2, [9, 2])
