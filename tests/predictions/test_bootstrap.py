"""Intervals and comparisons by drawing rows again: seeded, and as wide as theory says."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from sousbatch.errors import UsageError
from sousbatch.predictions.bootstrap import Sample, compare, intervals
from sousbatch.predictions.measure import Case
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import Scoring


def sample_of(texts: Sequence[str], targets: Sequence[str], *metrics: str) -> Sample:
    scoring = Scoring(metrics, workers=1)
    sample = Sample(scoring.metrics)
    rows = [PredictionRow(index=place, prediction=text) for place, text in enumerate(texts)]
    for block in scoring.measure(
        Case(row=row, target=target, input=None) for row, target in zip(rows, targets, strict=True)
    ):
        sample.add(block.model, len(block.cases))
    assert sample.scores() == pytest.approx(scoring.scores()["model"], abs=1e-12)
    return sample


TARGETS = ["a" if place % 3 else "b" for place in range(400)]
DRAW = random.Random(5)
GOOD = [target if DRAW.random() < 0.8 else "c" for target in TARGETS]
BAD = [target if DRAW.random() < 0.4 else "b" for target in TARGETS]


def test_an_interval_is_as_wide_as_that_of_a_share() -> None:
    sample = sample_of(GOOD, TARGETS, "exact_match", "macro_f1", "cer")
    found = intervals(sample, num_draws=800)
    share = sample.scores()["exact_match"]
    half = 1.96 * math.sqrt(share * (1 - share) / len(TARGETS))
    assert found["exact_match"] == pytest.approx((share - half, share + half), abs=0.012)
    assert found == intervals(sample, num_draws=800)
    assert found != intervals(sample, num_draws=800, seed=1)
    for name, (low, high) in found.items():
        assert low < sample.scores()[name] < high


def test_a_difference_is_told_from_chance() -> None:
    good, bad = (sample_of(texts, TARGETS, "accuracy", "macro_f1") for texts in (GOOD, BAD))
    found = compare(bad, good, num_draws=200)["accuracy"]
    assert found.difference == good.scores()["accuracy"] - bad.scores()["accuracy"]
    assert found.interval[0] < found.difference < found.interval[1] and found.p == 1 / 201
    same = compare(good, good, num_draws=200)["accuracy"]
    assert (same.difference, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_other_rows_are_not_compared() -> None:
    with pytest.raises(UsageError, match="400 rows cannot be compared with 399"):
        compare(sample_of(GOOD, TARGETS, "cer"), sample_of(GOOD[1:], TARGETS[1:], "cer"))
