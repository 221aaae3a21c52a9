"""Measuring in blocks and processes: the same scores, and what goes wrong is named."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from sousbatch.errors import RunError, UsageError
from sousbatch.predictions.measure import Case, exact_parts
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import paired, score_cases
from sousbatch.predictions.selection import Selection

METRIC = """
from sousbatch.predictions.metrics import Metric

def returned(answers):
    return {{"odd": {value}}}

ODD = Metric(score=returned, better="higher", needs=())
"""


def cases(num_rows: int) -> list[Case]:
    draw = random.Random(0)
    texts = ["".join(draw.choices("가나다 라", k=12)) for _ in range(num_rows)]
    return [
        Case(row=PredictionRow(index=place, prediction=text, id=f"r{place}"), target=text[::-1], input=text)
        for place, text in enumerate(texts)
    ]


def test_processes_change_no_score() -> None:
    some = cases(4200)
    names = ["rouge", "cer", "macro_f1", "squad_f1"]
    assert score_cases(some, metrics=names, workers=2) == score_cases(some, metrics=names, workers=1)


def test_a_process_that_is_killed_is_named(third_party: Callable[..., None]) -> None:
    value = "__import__('os')._exit(1)"
    third_party("sousbatch.metrics", "odd = toy_module:ODD", METRIC.format(value=value))
    with pytest.raises(RunError, match="a process that scores was killed"):
        score_cases(cases(4200), metrics=["odd"], workers=2)


def test_parts_add_up_exactly() -> None:
    draw = random.Random(1)
    values = [draw.choice((1e17, 1.0, 1e-17)) * draw.uniform(-1, 1) for _ in range(1000)]
    assert sum(map(Fraction, exact_parts(values))) == sum(map(Fraction, values))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0.5", "metric 'odd' returned 0.5 as 'odd' for 2 rows; it returns a list with a value for each row"),
        ("[1.0]", "returned 1 values as 'odd' for 2 rows"),
        ("[1.0, float('nan')]", "returned nan as 'odd' for the row with index 1"),
        ("['a', None]", "returned texts as 'odd', such as 'a', and has no `total`"),
        ("[1.0, [2]]", r"returned \[2\] as 'odd', which is no number"),
    ],
)
def test_what_a_metric_returns_is_checked(third_party: Callable[..., None], value: str, words: str) -> None:
    third_party("sousbatch.metrics", "odd = toy_module:ODD", METRIC.format(value=value))
    with pytest.raises(UsageError, match=words):
        score_cases(cases(2), metrics=["odd"])


def test_a_metric_may_return_an_array(third_party: Callable[..., None]) -> None:
    value = "__import__('numpy').array([1, 2])"
    third_party("sousbatch.metrics", "odd = toy_module:ODD", METRIC.format(value=value))
    assert score_cases(cases(2), metrics=["odd"])["model"] == {"odd": 1.5}


@pytest.mark.parametrize(("num_left", "num_right"), [(1, 3), (3, 1), (0, 1), (1, 0)])
def test_rows_that_are_missing_are_counted(num_left: int, num_right: int) -> None:
    with pytest.raises(UsageError, match=f"{num_left} predictions cannot be scored against {num_right} targets"):
        list(paired(range(num_left), range(num_right)))


def test_texts_before_post_have_scores_of_their_own() -> None:
    rows = [
        PredictionRow(index=0, prediction="가", fields={"raw_prediction": "가</s>"}),
        PredictionRow(index=1, prediction="나"),
    ]
    some = [Case(row=row, target=target, input="가") for row, target in zip(rows, "가나", strict=True)]
    found = score_cases(some, metrics=["exact_match"])
    assert {who: scores["exact_match"] for who, scores in found.items()} == {
        "model": 1.0,
        "before_post": 0.5,
        "copy_input": 0.5,
    }


def test_odd_texts_are_measured() -> None:
    texts: list[Any] = ["", "가\u2028나\x00", "שלום", "가" * (1 << 20), math.nan]
    odd = [
        Case(row=PredictionRow(index=place, prediction=text), target=text, input=None)
        for place, text in enumerate(texts)
    ]
    found = score_cases(odd, metrics=["exact_match", "cer", "wer", "rouge1"])
    assert set(found) == {"model"}
    assert found["model"]["exact_match"] == 1.0 and found["model"]["cer"] == 0.0


def test_rows_are_chosen_the_same_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> dict[str, list[Any]]:
        from sousbatch.predictions.scoring import Scoring

        scoring = Scoring(["cer"], workers=1)
        selection = Selection(metrics=scoring.metrics, worst=3, best=2, random=4, indices=(7,), search="가나")
        for block in scoring.measure(cases(50)):
            selection.add(block)
        found = {why: [row.to_json() for row in rows] for why, rows in selection.chosen().items()}
        assert json.dumps(found)
        return found

    whole = chosen()
    assert [len(whole[why]) for why in ("worst", "best", "random", "row")] == [3, 2, 4, 1]
    worst = [row["scores"]["cer"] for row in whole["worst"]]
    assert worst == sorted(worst, reverse=True) and worst[0] > whole["best"][0]["scores"]["cer"]
    assert whole["row"][0]["id"] == "r7" and all(
        "가나" in json.dumps(row, ensure_ascii=False) for row in whole["found"]
    )
    monkeypatch.setattr("sousbatch.predictions.measure._BLOCK_ROWS", 4)
    assert chosen() == whole
