from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from sousbatch.errors import UsageError
from sousbatch.predictions.metrics.tokenizers import tokenize_characters, tokenize_words
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import score_texts, score_with_baseline


@pytest.mark.parametrize(
    ("text", "reference", "accuracy", "cer"),
    [
        ("가나다라", "가나다라", 1.0, 0.0),
        ("가나다마", "가나다라", 0.75, 0.25),
        ("가나다", "가나다라", 0.75, 0.25),
        ("나다라", "가나다라", 0.0, 0.25),
        ("가나다라마바", "가나다", 0.5, 1.0),
        ("", "가나", 0.0, 1.0),
        ("", "", 1.0, 0.0),
        ("가나", "", 0.0, 2.0),
    ],
)
def test_character_metrics(text: str, reference: str, accuracy: float, cer: float) -> None:
    scores = score_texts([text], [reference], metrics=["character_accuracy", "cer"])
    assert scores == pytest.approx({"character_accuracy": accuracy, "cer": cer})


def test_character_metrics_weigh_rows_by_their_length() -> None:
    scores = score_texts(["가" * 9, "나"], ["가" * 9, "다"], metrics=["character_accuracy", "cer", "exact_match"])
    assert scores == pytest.approx({"character_accuracy": 0.9, "cer": 0.1, "exact_match": 0.5})


def test_composed_and_decomposed_hangul_are_equal() -> None:
    text = "깨끗한 방"
    scores = score_texts([unicodedata.normalize("NFD", text)], [text])
    assert scores["exact_match"] == scores["character_accuracy"] == scores["rouge1_f1"] == 1.0
    assert scores["cer"] == 0.0


def test_rouge_sees_hangul_which_the_usual_tokenizer_drops() -> None:
    text, reference = "직원분들이 아주 친절하고 방이 깨끗해요", "직원분들이 친절하고 방이 정말 깨끗해요"
    assert RougeScorer(["rouge1"]).score(reference, text)["rouge1"].fmeasure == 0.0
    scores = score_texts([text], [reference], metrics=["rouge1", "rouge2", "rougeL"])
    assert scores["rouge1_f1"] == pytest.approx(0.8)
    assert scores["rouge2_f1"] == pytest.approx(0.25)
    assert scores["rougeL_f1"] == pytest.approx(0.8)


def test_rouge_of_english_is_what_the_usual_tokenizer_gives() -> None:
    text, reference = "The quick, brown fox-dog jumps!", "the quick dog jumps over 2 logs."
    usual = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, text)
    scores = score_texts([text], [reference], metrics=["rouge1", "rouge2", "rougeL"])
    for metric, score in usual.items():
        found = [scores[f"{metric}_{part}"] for part in ("precision", "recall", "f1")]
        assert found == pytest.approx([score.precision, score.recall, score.fmeasure])


def test_precision_and_recall_are_not_confused() -> None:
    scores = score_texts(["하나 둘 셋 넷"], ["하나 둘"], metrics=["rouge1"])
    assert (scores["rouge1_precision"], scores["rouge1_recall"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [("", "", 1.0), ("", "가 나", 0.0), ("가 나", "", 0.0), ("!?", "가", 0.0)],
)
def test_rouge_of_empty_texts(text: str, reference: str, expected: Any) -> None:
    scores = score_texts([text], [reference], metrics=["rouge1", "rouge2", "rougeL"])
    assert set(scores.values()) == {expected}
    assert len(scores) == 9


def test_characters_as_tokens_score_parts_of_words() -> None:
    words = score_texts(["서울특별시"], ["서울시"], metrics=["rouge1"])
    characters = score_texts(["서울특별시"], ["서울시"], metrics=["rouge1"], tokenizer="characters")
    assert words["rouge1_f1"] == 0.0
    assert characters["rouge1_f1"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("안녕, World-2! 방은(아주) 좋아요…", ["안녕", "world", "2", "방은", "아주", "좋아요"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("줄\u2028바꿈\n 👍", ["줄", "바꿈"]),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_marks_and_digits_of_any_script(text: str, words: list[str]) -> None:
    assert tokenize_words(text) == words
    assert tokenize_characters(text) == list("".join(words))


def test_scores_stand_beside_those_of_the_copied_input() -> None:
    rows = [PredictionRow(index=number, prediction=text) for number, text in enumerate(["가나다", "라마"])]
    scores = score_with_baseline(rows, ["가나다", "라바"], ["가나나", "라마"], metrics=["exact_match", "cer"])
    assert scores == {
        "model": pytest.approx({"exact_match": 0.5, "cer": 0.2}),
        "copy_input": pytest.approx({"exact_match": 0.0, "cer": 0.4}),
    }


@pytest.mark.parametrize(
    ("texts", "targets", "options", "word"),
    [
        ([], [], {"metrics": ["cer"]}, "no predictions"),
        (["가"], ["가", "나"], {"metrics": ["cer"]}, "1 predictions cannot be scored against 2 targets"),
        (
            ["가"],
            [["가", "나"]],
            {"metrics": ["cer"]},
            "metric 'cer' compares texts, and the target of row 0 is .*squad_f1",
        ),
        ([["가"]], ["가"], {"metrics": ["accuracy"]}, "'accuracy' compares texts, and the prediction of row 0 is"),
        (["가"], ["가"], {"metrics": ["rouge3"]}, "metric 'rouge3' is unknown; known: .*did you mean"),
        (
            ["가"],
            ["가"],
            {"metrics": ["cer"], "tokenizer": "mecab"},
            "tokenizer 'mecab' is unknown; known: words",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(
    texts: list[str], targets: list[str], options: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        score_texts(texts, targets, **options)
