"""What every metric does: those in `metrics.METRICS` and one of a third-party package are tested alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from sousbatch.errors import UsageError
from sousbatch.predictions.measure import Case, scores_of
from sousbatch.predictions.metrics import DEFAULT_METRICS, METRICS, Answers, Metric
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import BASELINE, MODEL, label, score_cases, score_with_baseline

TARGETS = ["방이 깨끗하고 좋아요", "조금 시끄러웠지만 괜찮았습니다", "The quick brown fox", "바다 전망"]
WORSE = ["방이 더럽고 좋아요", "조금 시끄러웠습니다", "The slow brown fox", "바다 전망이 최고"]
WRONG = ["xyz", "", "온통 다른 글", "q"]
TOY = """
from sousbatch.predictions.metrics import Metric

def count(answers):
    return {"toy_margin": [abs(row.fields["margin"]) for row in answers.rows]}

TOY = Metric(score=count, better="lower", needs=(), fields=("margin",))
"""


def answers_of(texts: Sequence[str], quality: float) -> Answers:
    """Return predictions with the fields that any task adds; *quality* is 1 where all is right."""
    fields = {"margin": 1 - quality}
    rows = [PredictionRow(index=number, prediction=text, fields=fields) for number, text in enumerate(texts)]
    return Answers(rows=rows, targets=TARGETS, inputs=WORSE, tokenizer="words")


@pytest.fixture(params=[*METRICS, "toy"])
def named(request: pytest.FixtureRequest, third_party: Callable[..., None]) -> tuple[str, Metric]:
    third_party("sousbatch.metrics", "toy = toy_module:TOY", TOY)
    return request.param, METRICS.load(request.param)


def scores_of_block(name: str, metric: Metric, answers: Answers) -> dict[str, float]:
    sums = {
        column: sum(values) if isinstance(values[0], (int, float)) else Counter(filter(None, values))
        for column, values in metric.score(answers).items()
    }
    return scores_of(name, metric, sums, len(answers.rows))


def test_scores_are_finite_and_named_after_the_metric(named: tuple[str, Metric]) -> None:
    name, metric = named
    answers = answers_of(WORSE, 0.5)
    assert all(len(column) == len(answers.rows) for column in metric.score(answers).values())
    scores = scores_of_block(name, metric, answers)
    assert scores and all(score.startswith(name) for score in scores)
    assert {label(score).endswith("(lower is better)") for score in scores} == {metric.better == "lower"}
    assert all(isinstance(value, float) and math.isfinite(value) for value in scores.values())
    assert scores_of_block(name, metric, answers_of(WORSE, 0.5)) == scores


def test_better_predictions_get_better_scores(named: tuple[str, Metric]) -> None:
    name, metric = named
    right, worse, wrong = (
        scores_of_block(name, metric, answers_of(texts, quality))
        for texts, quality in ((TARGETS, 1.0), (WORSE, 0.5), (WRONG, 0.0))
    )
    sign = 1 if metric.better == "higher" else -1
    for score in right:
        assert sign * right[score] > sign * worse[score] >= sign * wrong[score], score


def test_blocks_change_no_score(named: tuple[str, Metric], monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = named
    cases = [
        Case(row=row, target=target, input=text)
        for _ in range(7)
        for row, target, text in zip(answers_of(WORSE, 0.1).rows, TARGETS, WRONG, strict=True)
    ]
    whole = score_cases(cases, metrics=[name])
    monkeypatch.setattr("sousbatch.predictions.measure._BLOCK_ROWS", 3)
    assert score_cases(cases, metrics=[name]) == whole


def test_what_a_metric_does_not_need_changes_nothing(named: tuple[str, Metric]) -> None:
    _, metric = named
    answers = answers_of(WORSE, 0.5)
    others = {"target": {"targets": WORSE}, "input": {"inputs": WRONG}, "tokenizer": {"tokenizer": "characters"}}
    for need, change in others.items():
        is_same = metric.score(replace(answers, **change)) == metric.score(answers)  # type: ignore[arg-type]
        assert is_same == (need not in metric.needs), need


def test_missing_fields_are_named(named: tuple[str, Metric]) -> None:
    name, metric = named
    rows = [PredictionRow(index=number, prediction=text) for number, text in enumerate(WORSE)]
    if metric.fields:
        with pytest.raises(UsageError, match=f"metric '{name}' needs the field '{metric.fields[0]}'"):
            score_with_baseline(rows, TARGETS, WORSE, metrics=[name])
    else:
        assert score_with_baseline(rows, TARGETS, WORSE, metrics=[name])[MODEL]


def test_a_third_party_metric_has_no_score_where_the_task_added_nothing(third_party: Callable[..., None]) -> None:
    third_party("sousbatch.metrics", "toy = toy_module:TOY", TOY)
    found = score_with_baseline(answers_of(WORSE, 0.25).rows, TARGETS, WORSE, metrics=["toy", "exact_match"])
    assert found == {MODEL: {"toy_margin": 0.75, "exact_match": 0.0}, BASELINE: {"exact_match": 0.0}}


def test_the_defaults_are_known() -> None:
    assert set(DEFAULT_METRICS) <= set(METRICS)
