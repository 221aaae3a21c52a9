"""A predicted row is written and read in one place; its bytes are those of every version so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import DamagedError, RunError, UsageError
from sousbatch.predictions.rows import PredictionRow, predictions_of

FILE = Path("predictions.jsonl")


@pytest.mark.parametrize(
    "row, line",
    [
        (PredictionRow(index=0, prediction="가\u2028나"), '{"index": 0, "prediction": "가\u2028나"}\n'),
        (PredictionRow(index=1, id="a-1", prediction=""), '{"index": 1, "id": "a-1", "prediction": ""}\n'),
        (PredictionRow(index=2, id=None, prediction="x"), '{"index": 2, "id": null, "prediction": "x"}\n'),
        (PredictionRow(index=2, id=float("nan"), prediction="x"), '{"index": 2, "id": NaN, "prediction": "x"}\n'),
        (
            PredictionRow(index=3, prediction="x", fields={"span": [0, 4], "n_best": [{"text": "x"}]}),
            '{"index": 3, "prediction": "x", "span": [0, 4], "n_best": [{"text": "x"}]}\n',
        ),
    ],
)
def test_the_bytes_of_a_row(row: PredictionRow, line: str) -> None:
    assert row.to_line() == line.encode()


@pytest.mark.parametrize("value", ["half a pair: \ud800", {1, 2}])
def test_a_row_that_is_no_json_is_named(value: object) -> None:
    with pytest.raises(RunError, match="row 7 cannot be written as JSON"):
        PredictionRow(index=7, prediction=value).to_line()


@pytest.mark.parametrize(
    "values",
    [
        {"index": 0, "prediction": "x"},
        {"index": 0, "id": None, "prediction": "x", "label": 2, "probabilities": [0.1, 0.9]},
    ],
)
def test_what_was_written_is_read_back(values: dict[str, Any]) -> None:
    assert PredictionRow.from_json(values, position=5).to_json() == values


def test_files_of_others_may_lack_the_index_name_the_field_otherwise_or_have_numbers_as_text() -> None:
    rows = predictions_of([{"answer": "a"}, {"index": "1", "answer": "b", "prediction": "c"}], FILE, field="answer")
    assert [(row.index, row.prediction, dict(row.fields)) for row in rows] == [
        (0, "a", {}),
        (1, "b", {"prediction": "c"}),
    ]


@pytest.mark.parametrize(
    "rows, error, words",
    [
        (
            [{"index": 0, "text": "a"}],
            UsageError,
            "row 1 of predictions.jsonl has no 'prediction'; it has: index, text",
        ),
        ([{"index": 0, "prediction": None}], UsageError, "row 1 of predictions.jsonl has null as 'prediction'"),
        ([{"index": 0, "prediction": float("nan")}], UsageError, "row 1 of predictions.jsonl has NaN as 'prediction'"),
        ([{"index": 1, "prediction": "a"}], DamagedError, "predictions.jsonl is not in row order"),
        ([{"index": None, "prediction": "a"}], DamagedError, "predictions.jsonl is not in row order"),
    ],
)
def test_what_is_not_the_predictions_of_all_rows_in_order_is_refused(
    rows: list[dict[str, Any]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        list(predictions_of(rows, FILE))
