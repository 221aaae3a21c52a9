"""What is asked of an engine for each row, and what is made of its answers; the engine here says what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sousbatch.recipes
from sousbatch.jobs.generation import Generation, Prompt
from sousbatch.jobs.generation.texts import cut, decode, last_sentences, num_tokens_within
from sousbatch.jobs.tasks.generating import GeneratingAnswerer
from sousbatch.predictions.merge import merge_units
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.units import open_layout, write_unit
from sousbatch.recipes.inspect.tokenizer import load_full
from sousbatch.recipes.schema import Data, Predict, StageSettings

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_full(TINY, (), trusts_code=False)


class Scripted:
    """Continues each prompt with the next of some texts, and keeps what it was asked."""

    config: dict[str, Any] = {}

    def __init__(self, tokenizer: Any, said: Sequence[str], ended: Any = "stop") -> None:
        self.tokenizer, self.said, self.ended, self.asked = tokenizer, list(said), ended, list[Prompt]()

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        self.asked += prompts
        ids = [self.tokenizer(self.said.pop(0), add_special_tokens=False)["input_ids"] for _ in prompts]
        return [Generation(ids=one, ended=self.ended if self.said else "stop") for one in ids]

    def with_settings(self, settings: StageSettings) -> Scripted:
        return self


def _settings(**changes: Any) -> StageSettings:
    return StageSettings(data=Data(prompt="{input}"), predict=Predict(**changes))


def test_a_chunk_continues_the_prompt_and_the_last_sentences(tokenizer: Any) -> None:
    engine = Scripted(tokenizer, ["가나. 다라! 마바. 사", "아자. 차", "카타."], ended="length")
    settings = _settings(max_new_tokens=500, chunk_tokens=40, chunk_sentences=1)
    (made,) = GeneratingAnswerer(settings, engine, tokenizer).answer([(7, {"input": "글"})])
    prompt = list(engine.asked[0].ids)
    carried = [decode(tokenizer, one.ids[len(prompt) :]) for one in engine.asked]
    assert [one.strip() for one in carried] == ["", "마바. 사", "사아자. 차"]
    assert all(list(one.ids)[: len(prompt)] == prompt for one in engine.asked)
    num_first = len(tokenizer("가나. 다라! 마바. 사", add_special_tokens=False)["input_ids"])
    assert [(one.row, one.first, one.max_new_tokens) for one in engine.asked[:2]] == [(7, 0, 40), (7, num_first, 40)]
    assert made == {"prediction": "가나. 다라! 마바. 사아자. 차카타."}


def test_the_sentences_that_a_chunk_continues_are_no_longer_than_a_chunk(tokenizer: Any) -> None:
    engine = Scripted(tokenizer, ["a" * 8, "b" * 8, "c"], ended="length")
    settings = _settings(max_new_tokens=17, chunk_tokens=8)
    (made,) = GeneratingAnswerer(settings, engine, tokenizer).answer([(0, {"input": "글"})])
    assert tokenizer.decode(list(engine.asked[2].ids)[len(engine.asked[0].ids) :]) == "b" * 8
    assert engine.asked[2].max_new_tokens == 1
    assert made == {"prediction": "a" * 8 + "b" * 8 + "c"}


@pytest.mark.parametrize(
    ("text", "count", "rest"),
    [
        ("하나. 둘. 셋", 1, "둘. 셋"),
        ("하나. 둘. 셋", 2, "하나. 둘. 셋"),
        ('He said "no." Then 3.5 left', 1, 'He said "no." Then 3.5 left'),
        ("한 줄\n두 줄\n세", 1, "두 줄\n세"),
        ("끝이 없다", 3, "끝이 없다"),
        ("", 1, ""),
    ],
)
def test_the_last_sentences_are_found(text: str, count: int, rest: str) -> None:
    assert text[last_sentences(text, count) :] == rest


def test_a_text_is_cut_at_the_first_stop_and_at_the_most_characters(tokenizer: Any) -> None:
    assert cut("가나다 끝 라 끝", ("끝", "라"), None) == "가나다 "
    assert cut("가나다", ("끝",), 2) == "가나" and cut("끝", ("끝",), None) == ""
    ids = tokenizer("가나다", add_special_tokens=False)["input_ids"]
    assert [num_tokens_within(tokenizer, ids, count) for count in (0, 3, 99)] == [0, len(ids), len(ids)]


STRANGE = ["a\u2028b\x85c", "nul\x00", "x" * 1_000_000, "שלום \u202eabc", "", '"quoted"\r\n\ttab', "한" * 3]


def test_a_blank_that_the_tokenizer_puts_before_every_text_is_no_part_of_an_answer(tokenizer: Any) -> None:
    inner = Tokenizer(models.BPE({sign: number for number, sign in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    inner.decoder = decoders.ByteLevel()
    for adds_blank in (True, False):
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_blank)
        loaded = PreTrainedTokenizerFast(tokenizer_object=inner)
        for text in ("ab", " ab"):
            ids = loaded(text, add_special_tokens=False)["input_ids"]
            assert decode(loaded, ids) == ("ab" if adds_blank else text)


def test_strange_texts_and_ids_come_through_units_and_merge_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    class Said(Scripted):
        def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
            return [Generation(ids=[prompt.row], ended="stop") for prompt in prompts]

    class Decoding:
        """The tokenizer, to which a token is a whole text."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *given: Any, **options: Any) -> Any:
            return tokenizer(*given, **options)

        def decode(self, ids: list[int], **options: Any) -> str:
            return STRANGE[ids[0]]

    rows = [(number, {"input": text[:50], "id": f"id\u2028{number}"}) for number, text in enumerate(STRANGE)]
    made = GeneratingAnswerer(_settings(), Said(tokenizer, []), Decoding()).answer(rows)
    layout = open_layout(tmp_path / "units", "key", len(rows), 3)
    lines = [
        PredictionRow.from_json({**one, "id": row["id"]}, position=number)
        for one, (number, row) in zip(made, rows, strict=True)
    ]
    for number in range(layout.num_units):
        place = layout.rows_of(number)
        write_unit(tmp_path / "units", layout, number, lines[place.start : place.stop], "key", 1, 0)
    merge_units(tmp_path / "units", tmp_path / "predictions.jsonl")
    from sousbatch.recipes.data.rows import read_rows

    read = list(read_rows(tmp_path / "predictions.jsonl"))
    assert [one["prediction"] for one in read] == STRANGE
    assert [one["id"] for one in read] == [row["id"] for _, row in rows]
