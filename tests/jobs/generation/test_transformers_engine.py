"""Answers depend on the row alone, not on the rest of its batch; each ends where its own limits say."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sousbatch.recipes
from sousbatch.errors import RunError
from sousbatch.jobs.generation import Prompt
from sousbatch.recipes.schema import Data, Model, Predict, Recipe

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
ROWS = [(number, {"input": text}) for number, text in enumerate(["가", "나다라", "마바", "사아자차카", "타"])]
RECIPE = Recipe(
    model=Model(path="x"),
    data=Data(prompt="{input}", separator="<sep>"),
    predict=Predict(max_new_tokens=8, batch_rows=2),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(TINY)
    config.initializer_range = 0.3  # weights that say something else at each step, and the end at some
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def answers(recipe, model_dir, rows):
    from sousbatch.jobs.tasks import load_model

    return load_model(recipe, model_dir, TINY, "cpu", "float32").answerer(recipe).answer(rows)


@pytest.mark.parametrize("sample", [False, True])
def test_a_row_gets_the_same_answer_in_any_batch(model_dir, sample):
    recipe = replace(RECIPE, predict=replace(RECIPE.predict, sample=sample))
    together = answers(recipe, model_dir, ROWS)
    alone = [
        answers(replace(recipe, predict=replace(recipe.predict, batch_rows=1)), model_dir, [row])[0] for row in ROWS
    ]
    assert together == alone


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
EXPERTS = SIZES | {"num_local_experts": 2, "num_key_value_heads": 1, "output_router_logits": True}
RECURRENT = {"rwkv": SIZES | {"attention_hidden_size": 32}, "recurrent_gemma": SIZES | {"lru_width": 32}}


MODELS = {**RECURRENT, "mixtral": EXPERTS}  # the last computes beside padding what balances its experts in training


@pytest.mark.parametrize("kind", MODELS)
def test_such_a_model_answers_a_row_in_a_batch_as_alone(kind, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    tiny = AutoConfig.from_pretrained(TINY)
    ids = {name: getattr(tiny, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind], **ids))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    recipe = replace(RECIPE, predict=replace(RECIPE.predict, batch_rows=5))
    together = answers(recipe, tmp_path, ROWS)
    assert together == [answers(recipe, tmp_path, [row])[0] for row in ROWS]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_row_ends_with_the_token_that_must_be_its_last_at_its_own_most_tokens(num_beams, tmp_path):
    """What `generate` does for a row alone; the length of an answer is a share of its input's."""
    import torch
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ends = dict.fromkeys(("eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), tokenizer.eos_token_id)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ends}
    model = BartForConditionalGeneration(BartConfig(**sizes, **ids, encoder_ffn_dim=32, decoder_ffn_dim=32)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    predict = Predict(max_new_tokens=8, batch_rows=5, length_ratio=1.0, num_beams=num_beams)
    recipe = replace(RECIPE, task="seq2seq", data=Data(prompt="{input}"), predict=predict)
    together = [one["prediction"] for one in answers(recipe, tmp_path, ROWS)]
    alone = [answers(recipe, tmp_path, [row])[0]["prediction"] for row in ROWS]
    assert together == alone and "".join(together)
    for (_, row), answer in zip(ROWS, together, strict=True):
        source = tokenizer(row["input"], return_tensors="pt")
        most = min(8, len(tokenizer(row["input"], add_special_tokens=False)["input_ids"]))
        options = {"max_new_tokens": most, "num_beams": num_beams, "do_sample": False}
        own = model.generate(input_ids=source["input_ids"], forced_eos_token_id=tokenizer.eos_token_id, **options)
        assert answer == tokenizer.decode(own[0], skip_special_tokens=True)


def test_another_seed_draws_other_answers(model_dir):
    recipe = replace(RECIPE, predict=replace(RECIPE.predict, sample=True))
    assert answers(recipe, model_dir, ROWS) != answers(replace(recipe, seed=1), model_dir, ROWS)


def test_drawing_among_one_is_taking_the_likeliest(model_dir):
    greedy = answers(RECIPE, model_dir, ROWS)
    drawn = replace(RECIPE, predict=replace(RECIPE.predict, sample=True, top_k=1))
    assert answers(drawn, model_dir, ROWS) == greedy


@pytest.fixture(scope="module")
def engine(model_dir):
    return loaded(model_dir)


def loaded(model_dir: Path, settings: Any = RECIPE) -> tuple[Any, Any]:
    """Return an engine and its tokenizer."""
    from sousbatch.jobs.tasks import load_model

    found = load_model(settings, model_dir, TINY, "cpu", "float32", 2)
    return found.model, found.tokenizer


DISK = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}


@pytest.mark.parametrize("first", ["cpu", "disk"])
def test_a_model_whose_weights_are_elsewhere_answers_the_same(engine, model_dir, monkeypatch, first):
    from sousbatch.jobs.generation import transformers_engine

    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    placement = {"device_map": {**DISK, "model.embed_tokens": first, "lm_head": first, **layers}}
    monkeypatch.setattr(transformers_engine, "_placement", lambda request: placement)
    dealt = loaded(model_dir)
    assert {value.device.type for value in dealt[0]._model.parameters()} >= {"meta"}
    for changes in ({}, {"sample": True}, {"num_beams": 2}, {"keep_logprobs": 2}):
        assert answered(dealt, **changes) == answered(engine, **changes)


def test_a_model_without_a_place_for_some_layers_is_refused(model_dir, monkeypatch):
    from sousbatch.jobs.generation import transformers_engine

    placement = {"device_map": "auto", "max_memory": {"cpu": 600_000}}
    monkeypatch.setattr(transformers_engine, "_placement", lambda request: placement)
    with pytest.raises(RunError, match="does not fit into the memory of its 2 devices; .*predict.load_in=4bit"):
        loaded(model_dir)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("changes", [{"repetition_penalty": 9.0}, {"no_repeat_ngram": 1}, {"no_repeat_ngram": 2}])
def test_what_is_said_once_is_counted_without_the_padding_before_a_row(engine, model_dir, num_beams, changes):
    from sousbatch.jobs.generation.transformers_engine import TransformersEngine

    said = answered(engine, keep_logprobs=1)[0]["logprobs"]["tokens"]
    tokenizer = loaded(model_dir)[1]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(said[0])  # the first row is short, and begins with it
    other = TransformersEngine(RECIPE, engine[0]._model, tokenizer), tokenizer
    together = answered(other, num_beams=num_beams, **changes)
    assert together == [answered(other, rows=[row], num_beams=num_beams, **changes)[0] for row in ROWS]


@pytest.mark.parametrize(("width", "is_alike"), [("4bit", 1 - 1e-5), ("8bit", 0.98)])
def test_quantised_weights_are_small_and_compute_in_full(engine, model_dir, width, is_alike):
    import torch

    settings = replace(RECIPE, predict=replace(RECIPE.predict, load_in=width))
    small = loaded(model_dir, settings)
    assert small[0]._model.get_memory_footprint() < 0.6 * engine[0]._model.get_memory_footprint()
    if width == "4bit":
        assert [answered(small, rows=[row])[0] for row in ROWS] == answered(small) != answered(engine)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        made = small[0]._model(ids).logits.float()
        wanted = small[0]._model.dequantize()(ids).logits.float()
    assert torch.nn.functional.cosine_similarity(made, wanted, dim=-1).min() > is_alike


def answered(engine: Any, *, rows: Any = ROWS, data: Data = RECIPE.data, **changes: Any) -> list[dict[str, Any]]:
    from sousbatch.jobs.tasks.generating import GeneratingAnswerer

    loaded, tokenizer = engine
    recipe = replace(RECIPE, data=data, predict=replace(RECIPE.predict, batch_rows=8, **changes))
    return GeneratingAnswerer(recipe, loaded.with_settings(recipe), tokenizer).answer(rows)


def texts(engine: Any, **changes: Any) -> list[str]:
    return [one["prediction"] for one in answered(engine, **changes)]


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}, {"sample": True}])
def test_rows_of_one_batch_end_at_their_own_most_tokens(engine, changes):
    loaded, _ = engine
    recipe = replace(RECIPE, predict=replace(RECIPE.predict, batch_rows=8, **changes))
    most = [3, 8, 1, 5]
    prompts = [Prompt(ids=[5 + row, 7, 9], row=row, max_new_tokens=tokens) for row, tokens in enumerate(most)]
    together = loaded.with_settings(recipe).generate(prompts)
    assert together == [loaded.with_settings(recipe).generate([prompt])[0] for prompt in prompts]
    assert [len(one.ids) if one.ended == "length" else 0 for one in together] == most


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}, {"sample": True}])
def test_an_answer_is_a_share_of_its_own_input(engine, changes):
    _, tokenizer = engine
    sizes = [(len(tokenizer.tokenize(row["input"])), len(row["input"])) for _, row in ROWS]
    if "num_beams" not in changes:
        made = answered(engine, max_new_tokens=64, length_ratio=1.5, keep_logprobs=1, **changes)
        lengths = [len(one["logprobs"]["tokens"]) for one in made]
        assert all(length <= math.ceil(1.5 * tokens) for length, (tokens, _) in zip(lengths, sizes, strict=True))
        assert lengths[1] == math.ceil(1.5 * sizes[1][0])
    made = texts(engine, max_new_tokens=64, length_ratio=2.0, length_ratio_of="characters", **changes)
    assert all(len(text) <= 2 * characters for text, (_, characters) in zip(made, sizes, strict=True))
    assert max(len(text) / characters for text, (_, characters) in zip(made, sizes, strict=True)) == 2
    assert sorted({len(text) for text in texts(engine, max_characters=2, **changes)})[-1] == 2


@pytest.mark.parametrize("changes", [{}, {"num_beams": 2}, {"sample": True}, {"chunk_tokens": 3, "sample": True}])
def test_an_answer_ends_before_a_stop_text_wherever_its_tokens_end(engine, changes):
    whole = texts(engine, max_new_tokens=24, **changes)
    stop = next(text for text in whole if len(text) > 8)[4:6]  # lies across tokens, and for chunks across these
    found = texts(engine, max_new_tokens=24, stop=(unicodedata.normalize("NFD", stop), "never"), **changes)
    assert all(stop not in text for text in found)
    if "num_beams" not in changes:  # beams that end leave their place to others
        assert found == [text.partition(stop)[0] for text in whole] != whole


def test_a_stop_text_saves_the_steps_after_it(engine, monkeypatch):
    loaded, _ = engine
    steps = []
    hook = loaded._model.register_forward_hook(lambda *_: steps.append(1))
    stop = texts(engine, max_new_tokens=24, rows=ROWS[1:2])[0][2:4]
    before = len(steps)
    texts(engine, max_new_tokens=24, rows=ROWS[1:2], stop=(stop,))
    hook.remove()
    assert len(steps) - before <= 8


def test_a_token_that_stops_ends_an_answer(engine):
    tokens = [one["logprobs"]["tokens"] for one in answered(engine, keep_logprobs=1)]
    stop = next(ids for ids in tokens if len(ids) > 3)[2]
    cut = [one["logprobs"]["tokens"] for one in answered(engine, keep_logprobs=1, stop_ids=(stop,))]
    assert cut == [ids[: ids.index(stop)] if stop in ids else ids for ids in tokens]


def test_answers_are_not_shorter_than_the_least(engine):
    _, tokenizer = engine
    every = tuple(token for token in range(len(tokenizer)) if token % 2)
    lengths, least = (
        [len(one["logprobs"]["tokens"]) for one in answered(engine, keep_logprobs=1, stop_ids=every, **changes)]
        for changes in ({}, {"min_new_tokens": 5})
    )
    assert max(lengths) < 5 <= min(least)


def test_samples_are_drawn_for_each_row_and_the_first_is_the_prediction(engine):
    one, three = answered(engine, sample=True), answered(engine, sample=True, samples=3)
    assert [row["prediction"] for row in three] == [row["prediction"] for row in one]
    assert all(row["samples"][0] == row["prediction"] and len(set(row["samples"])) == 3 for row in three)
    assert answered(engine, sample=True, samples=3, rows=ROWS[2:3]) == three[2:3]


def test_kept_log_probabilities_are_those_of_the_model_itself(engine, model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    changes: dict[str, Any] = {"keep_logprobs": 3, "sample": True, "temperature": 2.0, "repetition_penalty": 1.5}
    kept = answered(engine, **changes)[1]["logprobs"]
    _, tokenizer = engine
    prompt = tokenizer("나다라<sep>", add_special_tokens=True)["input_ids"]
    prompt = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
    ids = torch.tensor([[*prompt, *kept["tokens"]]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert kept["chosen"] == pytest.approx(expected.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist(), abs=1e-4)
    values, best = expected.topk(3)
    assert [[token for token, _ in top] for top in kept["top"]] == best.tolist()
    assert [value for _, value in kept["top"][0]] == pytest.approx(values[0].tolist(), abs=1e-4)
    cut = answered(engine, max_characters=2, **changes)[1]
    assert len(cut["logprobs"]["tokens"]) == len(cut["logprobs"]["top"]) <= 3


@pytest.mark.parametrize("changes", [{}, {"sample": True}, {"min_new_tokens": 20}])
def test_chunks_that_continue_all_of_an_answer_give_what_one_piece_gives(engine, changes):
    whole = answered(engine, max_new_tokens=23, keep_logprobs=1, **changes)
    chunks = answered(engine, max_new_tokens=23, keep_logprobs=1, chunk_tokens=11, chunk_sentences=99, **changes)
    for one, other in zip(whole, chunks, strict=True):
        assert one["logprobs"]["tokens"][:22] == other["logprobs"]["tokens"][:22]
        assert one["logprobs"]["chosen"][:22] == pytest.approx(other["logprobs"]["chosen"][:22], abs=1e-4)


def test_scores_that_are_no_numbers_are_refused_with_the_row(engine):
    import torch

    from sousbatch.errors import RunError

    loaded, tokenizer = engine
    head = loaded._model.get_output_embeddings().weight
    kept = head.detach().clone()
    try:
        for bad in (torch.nan, torch.inf):
            with torch.no_grad():
                head[9] = bad
            for changes in ({}, {"sample": True}, {"num_beams": 2}):
                with pytest.raises(
                    RunError, match=r"row 4: the model's scores for token 0 of the answer are not finite"
                ):
                    answered(engine, rows=ROWS[4:], **changes)
    finally:
        with torch.no_grad():
            head.copy_(kept)
