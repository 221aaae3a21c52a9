"""Texts between a tokenizer's own tokens: sources, targets, and what a cut leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import sousbatch.recipes
from sousbatch.recipes.data.framed import encode_pairs, encode_sources, encode_texts
from sousbatch.recipes.inspect.tokenizer import load_light
from sousbatch.recipes.schema import Data

MODELS = Path(sousbatch.recipes.__file__).parent / "library/models"
SPEC = Data(prompt="{input}", max_tokens=64, max_target_tokens=64)
TEXTS = ["가나다라 마바사", "", "hello 世界 🙂"]


def load(name: str, how: str) -> Any:
    return load_light(MODELS / name, ()) if how == "light" else AutoTokenizer.from_pretrained(MODELS / name)


@pytest.fixture(scope="module", params=["full", "light"])
def bert(request: pytest.FixtureRequest) -> Any:
    return load("tiny-bert", request.param)


@pytest.fixture(scope="module", params=["full", "light"])
def plain(request: pytest.FixtureRequest) -> Any:
    """A tokenizer that adds no tokens of its own, as KoBART's."""
    return load("tiny-hangul", request.param)


def test_a_text_stands_between_the_tokenizers_own_tokens(bert: Any) -> None:
    cls, sep = bert(["[CLS]", "[SEP]"], add_special_tokens=False)["input_ids"]
    for one in encode_texts(SPEC, TEXTS, bert, 64):
        assert (one.ids[:1], one.ids[-1:]) == (cls, sep)
        assert (one.num_tokens, one.is_long) == (len(one.ids), False)


@pytest.mark.parametrize(("policy", "kept"), [("cut_right", slice(1, 4)), ("cut_left", slice(-4, -1))])
def test_a_cut_leaves_the_tokenizers_own_tokens(bert: Any, policy: Any, kept: slice) -> None:
    whole = encode_texts(SPEC, TEXTS[:1], bert, 64)[0].ids
    cut = encode_texts(replace(SPEC, long_rows=policy), TEXTS[:1], bert, 5)[0]
    assert cut.ids == [whole[0], *whole[kept], whole[-1]]
    assert cut.is_long and cut.num_tokens == len(whole)


def test_a_target_ends_with_the_end_token_even_where_the_tokenizer_adds_none(plain: Any) -> None:
    end = plain.eos_token_id
    target = encode_texts(SPEC, ["가나"], plain, 64, is_target=True)[0]
    assert target.ids == [*plain(["가나"])["input_ids"][0], end]
    cut = encode_texts(replace(SPEC, long_rows="cut_right"), ["가나다라마바사"], plain, 3, is_target=True)[0]
    assert len(cut.ids) == 3 and cut.ids[-1] == end


def test_an_empty_text_is_one_token_to_read(plain: Any) -> None:
    assert [one.ids for one in encode_sources(SPEC, [{"input": ""}], plain, 64)] == [[plain.eos_token_id]]


def test_of_a_pair_the_whole_target_is_learned_and_each_side_has_its_limit(plain: Any) -> None:
    rows = [
        {"input": "가나다라마바", "target": "가"},
        {"input": "가", "target": "가나다라마바"},
        {"input": "", "target": " "},
    ]
    whole = encode_pairs(SPEC, rows, plain)
    sources = encode_sources(SPEC, rows, plain, 64)
    for pair, source in zip(whole, sources, strict=True):
        ((begin, end),) = pair.learned
        assert pair.ids[:begin] == source.ids and end == len(pair.ids)
        assert pair.num_learned == pair.num_target_tokens
        assert pair.num_tokens == len(source.ids)
    assert [pair.is_empty for pair in whole] == [False, False, True]
    short = replace(SPEC, max_tokens=8, max_target_tokens=4)
    long = [encode_pairs(replace(short, long_rows=policy), rows, plain) for policy in ("refuse", "cut_right")]
    assert [pair.is_long for pair in long[0]] == [pair.is_long for pair in long[1]]
    assert all(len(pair.ids) <= 12 for pair in long[1])


def test_full_and_light_tokenizers_agree_on_targets() -> None:
    found = [encode_pairs(SPEC, [{"input": "가", "target": "나"}], load("tiny-bert", how)) for how in ("full", "light")]
    assert found[0] == found[1]
