"""A row becomes windows that hold its answer or point to the first token, and what is wrong with a row is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from sousbatch.errors import UsageError
from sousbatch.recipes.facts import ModelFacts, TensorFacts
from sousbatch.recipes.forecast.parameters import params_of
from sousbatch.recipes.inspect.tokenizer import LightTokenizer
from sousbatch.recipes.schema import Adapter, Data, QuestionAnswering, StageSettings
from sousbatch.recipes.tasks.question_answering import TASK, Window

SPECIALS = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}
SETTINGS = StageSettings(
    task="question_answering",
    data=Data(max_tokens=11),
    question_answering=QuestionAnswering(stride_tokens=1, max_question_tokens=3, max_answer_tokens=2),
)
PASSAGE = "가나 다라, 마바 사아 자차 카타 파하"  # words and a comma: 8 tokens
ROW = {"question": "무엇 인가", "context": PASSAGE, "answers": {"text": ["사아"], "answer_start": [10]}}


@pytest.fixture(scope="module")
def tokenizer() -> LightTokenizer:
    words = {
        word: number
        for number, word in enumerate([*SPECIALS, *"가나 다라 마바 사아 자차 카타 파하 무엇 인가 , ?".split()])
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = {"bos_token": None, "eos_token": None, "pad_token": None, "cls_token": "[CLS]"}
    return LightTokenizer(inner, names)


def encoded(tokenizer: Any, row: Any, use: Any = "train", settings: StageSettings = SETTINGS) -> list[Any]:
    return TASK.encode(settings, use, [row], tokenizer, settings.data.max_tokens)


def test_all_windows_of_a_question_that_is_cut_begin_with_its_first_tokens(tokenizer: LightTokenizer) -> None:
    short, long = (encoded(tokenizer, ROW | {"question": f"무엇 인가 ?{more}"}) for more in ("", " 무엇 인가 ? 가나"))
    assert [(one.ids, one.start, one.end) for one in long] == [(one.ids, one.start, one.end) for one in short]


def test_a_long_passage_gives_windows_that_overlap(tokenizer: LightTokenizer) -> None:
    windows = encoded(tokenizer, ROW | {"question": "무엇 인가 ?"})
    assert [one.is_first for one in windows] == [True, False]
    assert all(len(one.ids) <= 11 and one.ids[:5] == windows[0].ids[:5] for one in windows)
    places = [[place for place in one.offsets if place is not None] for one in windows]
    assert places[0][-1] == places[1][0]  # one token is in both
    assert [PASSAGE[begin:end] for begin, end in (*places[0], *places[1][1:])] == PASSAGE.replace(",", " ,").split()
    assert [one.type_ids for one in windows] == [(0,) * 5 + (1,) * (len(one.ids) - 5) for one in windows]


def test_what_a_tokenizer_file_cuts_and_pads_changes_no_window(tokenizer: LightTokenizer) -> None:
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.enable_truncation(4)
    inner.enable_padding(length=20)
    assert encoded(SimpleNamespace(backend_tokenizer=inner, cls_token_id=1), ROW) == encoded(tokenizer, ROW)


def test_a_window_holds_the_answer_or_points_to_cls(tokenizer: LightTokenizer) -> None:
    windows = encoded(
        tokenizer, ROW | {"question": "무엇 인가 ?", "answers": {"text": ["자차 카타"], "answer_start": [13]}}
    )
    first, second = windows
    assert (first.start, first.end, first.learned) == (0, 0, ((0, 1),))  # 자차 is its last token, 카타 is not in it
    begin, end = second.offsets[second.start], second.offsets[second.end]
    assert PASSAGE[begin[0] : end[1]] == "자차 카타"
    assert [one.num_learned for one in windows] == [1, 2] and windows[0].remarks == ()


def test_tokens_with_a_blank_before_them_keep_the_places_of_their_letters() -> None:
    """RoBERTa's post-processor takes the blank off the places of its tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False)
    inner.train_from_iterator([PASSAGE, "무엇"], trainer)
    inner.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    names = {"bos_token": None, "eos_token": None, "pad_token": None, "cls_token": "<s>"}
    wide = replace(SETTINGS, data=Data(max_tokens=64))
    (window,) = encoded(LightTokenizer(inner, names), ROW | {"question": "무엇"}, settings=wide)
    begin, end = window.offsets[window.start], window.offsets[window.end]
    assert PASSAGE[begin[0] : end[1]] == "사아"


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["사아", "자차"], "answer_start": [10, 13]},
        [{"text": "사아", "answer_start": 10}],
        ["사아", "자차"],
        "사아",
        {"text": ["사아"], "answer_start": ["10"]},
    ],
)
def test_answers_are_read_in_every_form(tokenizer: LightTokenizer, answers: Any) -> None:
    expected = encoded(tokenizer, ROW)
    assert encoded(tokenizer, ROW | {"answers": answers}) == expected
    assert encoded(tokenizer, ROW | {"answers": answers, "answer_start": "10"}) == expected


TWICE = "가나 다라 가나"


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({}, ()),
        ({"answers": {"text": ["사아"], "answer_start": [11]}}, ("answer repaired",)),
        ({"context": TWICE, "answers": "다라"}, ()),
        ({"context": TWICE, "answers": "가나"}, ("answer several times",)),
        ({"context": TWICE, "answers": {"text": ["가나"], "answer_start": [6]}}, ()),
        ({"context": TWICE, "answers": {"text": ["가나"], "answer_start": [5]}}, ("answer misplaced",)),
        ({"answers": "하하"}, ("answer absent",)),
        ({"answers": {"text": [], "answer_start": []}}, ("no answer",)),
        ({"answers": ""}, ("no answer",)),
        ({"answers": "다라, 마바 사아"}, ("long answer",)),
        ({"answers": PASSAGE}, ("answer in no window",)),
        ({"question": "무엇 인가 무엇 인가"}, ("question cut",)),
        ({"question": " "}, ("no question",)),
        ({"context": " ", "answers": ""}, ("no passage", "no answer")),
    ],
)
def test_what_is_wrong_with_a_row_is_said_once(tokenizer: LightTokenizer, change: Any, remark: tuple[str, ...]) -> None:
    windows = encoded(tokenizer, ROW | change)
    assert windows[0].remarks == remark and not any(one.remarks for one in windows[1:])
    assert windows[0].ids[4 if "question" in change else 3] == 2 or remark == ("no question",)  # the question fits


def test_predicting_needs_no_answers_and_a_tokenizer_needs_places(tokenizer: LightTokenizer) -> None:
    row = {"question": "무엇", "context": PASSAGE}
    (window,) = encoded(tokenizer, row, "predict", replace(SETTINGS, data=Data(max_tokens=32)))
    assert isinstance(window, Window) and window.remarks == ()
    with pytest.raises(UsageError, match="needs a fast tokenizer"):
        encoded(SimpleNamespace(), row, "predict")


def test_a_new_head_trains_in_full_beside_adapters() -> None:
    tensors = (
        TensorFacts(name="bert.encoder.layer.0.attention.self.query.weight", shape=(8, 8), dtype="float32"),
        TensorFacts(name="qa_outputs.weight", shape=(2, 8), dtype="float32"),
        TensorFacts(name="qa_outputs.bias", shape=(2,), dtype="float32"),
    )
    facts = dict(folder="", tokenizer_folder="", digest="", has_weights=True, num_params=82, config={})
    params = params_of(replace(SETTINGS, adapter=Adapter(method="lora", rank=2)), ModelFacts(tensors=tensors, **facts))
    assert params.trainable == 2 * (8 + 8) + 2 * 8 + 2


Sousbatch = Callable[..., tuple[int, str, str]]
RECIPE = ["./small.yaml", "task=question_answering", "data.max_tokens=16", "question_answering.stride_tokens=2"]
RECIPE += [
    "question_answering.max_question_tokens=6",
    "question_answering.max_answer_tokens=3",
    "model.from_scratch=true",
]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": "없다"}, "1 of 3 rows (row 2) have an answer ('answers') that is not in their passage"),
        (
            {"context": TWICE, "answers": "가나", "answer_start": 2},
            "(row 2) have an answer that is several times in their",
        ),
        ({"context": ""}, "(row 2) have no passage ('context'); give them one"),
        (
            {"answers": "사아", "answer_start": 9},
            "(row 2) have an answer that is not where they say, but once in their",
        ),
        (
            {"question": "가 나 다 라 마 바 사"},
            "(row 2) have a question of more than question_answering.max_question_tokens=6",
        ),
        (
            {"answers": ""},
            "(row 2) have no answer, and predictions always will; set question_answering.null_threshold=0",
        ),
    ],
)
def test_rows_are_named_by_their_numbers_when_planned(
    sousbatch: Sousbatch, project: Path, change: dict[str, Any], said: str
) -> None:
    row = {"id": "a", "question": "무엇", "context": PASSAGE, "answers": "사아"}
    for split in ("train", "validation", "test"):
        rows = [row, {**row, **change} if split == "train" else row, row]
        (project / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, out, err = sousbatch("plan", *RECIPE)
    assert said in out + err and f"stage 'train', split 'train': {'1 of 3' * said.startswith('1')}" in out + err
    assert (code == 0) == ("set" in said or "once" in said or "more than" in said)
    assert "row" in err or "rows have a column 'id' that predictions will not have; set data.columns.id=id" in out


def test_a_metric_of_texts_is_refused_where_a_row_has_several_answers(sousbatch: Sousbatch, project: Path) -> None:
    row = {"question": "무엇", "context": PASSAGE, "answers": {"text": ["사아"], "answer_start": [11]}}
    metrics = ("checkpoints.metric=exact_match", "score.metrics=[squad_em,cer]")
    for answers, codes in ((row["answers"], (2, 2)), ("사아", (0, 0))):
        for split in ("train", "validation", "test"):
            (project / f"{split}.jsonl").write_text(json.dumps({**row, "answers": answers}) + "\n")
        found = [sousbatch("plan", *RECIPE, one) for one in metrics]
        assert tuple(code for code, *_ in found) == codes
        for (_, _, err), said in zip(found, ("metric has exact_match, which", "metrics has cer, which"), strict=True):
            assert (said in err) == (answers != "사아") and "squad_em or cer" not in err


def test_windows_without_room_for_a_passage_are_refused(sousbatch: Sousbatch, project: Path) -> None:
    code, _, err = sousbatch("plan", *RECIPE, "question_answering.stride_tokens=6")
    assert code == 2 and "data.max_tokens is 16, and a window of so many tokens has 6 for its passage" in err
