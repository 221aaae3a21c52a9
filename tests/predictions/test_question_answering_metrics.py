"""Answers are measured as the evaluation scripts of SQuAD 1.1, SQuAD 2.0 and KorQuAD 1.0 measure them.

The expected values were worked out by hand from the published definitions: a normalisation, then equality, or F1 over
the bag of words (SQuAD) or of characters (KorQuAD), the best over the right answers.
"""

from __future__ import annotations

from typing import Any

import pytest

from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import MODEL, score_with_baseline

# prediction, right answers, (em, f1)
SQUAD: dict[str, tuple[str, Any, tuple[float, float]]] = {
    "equal": ("Paris", ["Paris"], (1, 1)),
    "case, article, punctuation and blanks": ("the  Eiffel Tower!", ["Eiffel tower"], (1, 1)),
    "an article within a word stays": ("theatre", ["atre"], (0, 0)),
    "an article between words": ("out of the box", ["out of box"], (1, 1)),
    "punctuation joins words": ("well-known", ["well known"], (0, 0)),
    "the best of several": ("in 1990", ["1990s", "1990"], (0, 2 / 3)),
    "a word counts as often as in both": (
        "to be or not to be",
        ["to to to"],
        (0, 2 * (2 / 6) * (2 / 3) / (2 / 6 + 2 / 3)),
    ),
    "nothing in common": ("London", ["Paris"], (0, 0)),
    "curly quotes stay": ("“Paris”", ["Paris"], (0, 0)),
    "an empty prediction": ("", ["Paris"], (0, 0)),
    "right in letters, no word left": ("the", ["a"], (1, 0)),
    "one text": ("Paris", "Paris", (1, 1)),
    "as datasets writes it": ("Paris", {"text": ["Lyon", "Paris"], "answer_start": [0, 7]}, (1, 1)),
    "as the file has it": (
        "Paris",
        [{"text": "Lyon", "answer_start": 3}, {"text": "Paris", "answer_start": 9}],
        (1, 1),
    ),
}
# The same where some question has no answer: version 2.0.
SQUAD_2: dict[str, tuple[str, Any, tuple[float, float]]] = {
    "nothing said, nothing right": ("", [], (1, 1)),
    "nothing but an article is nothing": ("the", {"text": [], "answer_start": []}, (1, 1)),
    "something said, nothing right": ("Paris", [], (0, 0)),
    "nothing said, something right": ("", ["Paris"], (0, 0)),
    "right answers that are nothing are left out": ("Paris", ["the", "Paris"], (1, 1)),
    "no right answer is left": ("the", ["a"], (1, 1)),
}
KORQUAD: dict[str, tuple[str, Any, tuple[float, float]]] = {
    "equal": ("세종대왕", ["세종대왕"], (1, 1)),
    "its brackets and quotes": ("《훈민정음》", ["'훈민정음'"], (1, 1)),
    "each of them": ('‘가’ 〈나〉 (다) <라> "마"', ["가 나 다 라 마"], (1, 1)),
    "a bracket is a blank": ("가(나)다", ["가 나 다"], (1, 1)),
    "a bracket parts words": ("가(나)다", ["가나다"], (0, 1)),
    "other punctuation is nothing": ("가-나,다", ["가나다"], (1, 1)),
    "articles stay": ("the 가", ["가"], (0, 2 * (1 / 4) * 1 / (1 / 4 + 1))),
    "characters, not words": ("1446년에", ["1446년"], (0, 2 * (5 / 6) * 1 / (5 / 6 + 1))),
    "blanks do not count": ("세종 대왕", ["세종대왕"], (0, 1)),
    "a character counts as often as in both": ("가가나", ["가나나"], (0, 2 / 3)),
    "the best of several": ("서울시", ["부산", "서울"], (0, 0.8)),
    "nothing in common": ("서울", ["부산"], (0, 0)),
    "corner brackets stay": ("「가」", ["가"], (0, 0.5)),
    "lower case": ("KBS", ["kbs"], (1, 1)),
    "no answer": ("", "", (1, 1)),
}


def measured(prefix: str, *rows: tuple[str, Any]) -> tuple[float, float]:
    """Return exact match and F1, means over the rows."""
    scores = score_with_baseline(
        [PredictionRow(index=number, prediction=text) for number, (text, _) in enumerate(rows)],
        [target for _, target in rows],
        [None] * len(rows),
        metrics=[f"{prefix}_em", f"{prefix}_f1"],
    )[MODEL]
    return scores[f"{prefix}_em"], scores[f"{prefix}_f1"]


@pytest.mark.parametrize("case", SQUAD)
def test_squad_1(case: str) -> None:
    text, targets, expected = SQUAD[case]
    assert measured("squad", (text, targets)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", SQUAD_2)
def test_squad_2_is_told_by_a_question_without_answer(case: str) -> None:
    text, targets, expected = SQUAD_2[case]
    without_answer = (1, 1)
    mean = [(one + other) / 2 for one, other in zip(expected, without_answer, strict=True)]
    assert measured("squad", (text, targets), ("", [])) == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("case", KORQUAD)
def test_korquad(case: str) -> None:
    text, targets, expected = KORQUAD[case]
    assert measured("korquad", (text, targets)) == pytest.approx(expected, abs=1e-9)
