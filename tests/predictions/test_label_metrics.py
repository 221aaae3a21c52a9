"""Labels: what counts as the same one, and F1 as scikit-learn counts it."""

from __future__ import annotations

from typing import Any

import pytest

from sousbatch.predictions.metrics.labels import label_text
from sousbatch.predictions.scoring import score_texts


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ([1, 1.0, "1", " 1 "], "1"),
        ([True, "true"], "true"),
        (["좋아요", "좋아요", "좋아요\n"], "좋아요"),
        (["very  good"], "very  good"),
    ],
)
def test_a_label_is_the_same_in_every_type(values: list[Any], label: str) -> None:
    assert [label_text(value) for value in values] == [label] * len(values)


def test_f1_is_that_of_scikit_learn() -> None:
    """A label that is never found has an F1 of 0."""
    targets, found = ["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "a", "a"]
    scores = score_texts(found, targets, metrics=("accuracy", "macro_f1", "label_f1"))
    assert scores["accuracy"] == 0.5
    f1 = [2 * 2 / (4 + 2 + 1), 2 * 1 / (2 + 1 + 1), 0.0]
    assert [scores[f"label_f1_{label}"] for label in "abc"] == pytest.approx(f1)
    assert scores["macro_f1"] == pytest.approx(sum(f1) / 3)
