"""Score predictions against targets, beside the score of copying the input.

What a metric measures is its own (`metrics`), and `measure` sums it; here the sums become scores. Cleaning texts is
another step's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import fsum
from typing import Any, TypeVar, get_args

from ..errors import UsageError, nearest
from .measure import Case, Measured, Scores, Tally, measure
from .metrics import DEFAULT_METRICS, METRICS, Metric, is_lower_better
from .metrics.tokenizers import Tokenizer, tokenizer_problem
from .rows import RAW_PREDICTION, PredictionRow

T = TypeVar("T")
MODEL, BEFORE_POST, BASELINE = "model", "before_post", "copy_input"
WHO = {MODEL: "model", BEFORE_POST: "before predict.post", BASELINE: "copying the input"}  # how tables call them
_DETAILS = ("_precision", "_recall")
_NONE: Any = object()


class Scoring:
    """Scores cases while they are read.

    Each measured block is passed on, and its sums are kept.

    Raises:
        UsageError: a metric or the tokenizer is unknown, or cannot be used here.
    """

    def __init__(
        self,
        metrics: Sequence[str] = DEFAULT_METRICS,
        tokenizer: Tokenizer = "words",
        *,
        workers: int | None = None,
        baseline: bool = True,
    ) -> None:
        """Load the metrics.

        *workers* is the number of processes, by default that of the cores at hand. Without *baseline* the copied inputs
        are not measured.
        """
        _check_tokenizer(tokenizer)
        self.metrics: dict[str, Metric] = {name: METRICS.load(name) for name in metrics}
        for name, metric in self.metrics.items():
            if metric.problem:
                raise UsageError(f"metric {name!r} {metric.problem}")
        self.lower_is_better: frozenset[str] = frozenset()
        self.num_rows, self._has_input = 0, False
        self._tokenizer: Tokenizer = tokenizer
        self._wants_baseline = baseline
        self._workers = workers or len(os.sched_getaffinity(0))
        self._model, self._before, self._baseline = Tally(), Tally(), Tally()
        self._has_raw = False

    def measure(self, cases: Iterable[Case]) -> Iterator[Measured]:
        """Yield the measured blocks of all *cases*.

        Raises:
            UsageError: a metric failed, or a row lacks what it needs.
        """
        blocks = measure(
            cases, list(self.metrics), self._tokenizer, workers=self._workers, baseline=self._wants_baseline
        )
        for block in blocks:
            self._model.add(block.model, len(block.cases))
            self._before.add(block.before, len(block.cases))
            self._baseline.add(block.baseline, len(block.cases))
            self._has_raw = self._has_raw or any(RAW_PREDICTION in case.row.fields for case in block.cases)
            self._has_input = self._has_input or any(case.input is not None for case in block.cases)
            self.num_rows += len(block.cases)
            yield block

    def scores(self) -> dict[str, Scores]:
        """Return the scores of the "model", of "before_post" and of "copy_input".

        The second are those of the texts before `predict.post`, where it was used. The last are there where some row
        has an input. Both lack metrics that need fields of a task.

        Raises:
            UsageError: there were no rows.
        """
        if not self.num_rows:
            raise UsageError("there are no predictions to score")
        found = {MODEL: self._model.scores(self.metrics)}
        lower = {name: metric for name, metric in self.metrics.items() if metric.better == "lower"}
        self.lower_is_better = frozenset(self._model.scores(lower))
        if self._has_raw and (before := self._before.scores(self.metrics)):
            found[BEFORE_POST] = before
        if self._has_input and (copied := self._baseline.scores(self.metrics)):
            found[BASELINE] = copied
        return found


def score_cases(
    cases: Iterable[Case],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer = "words",
    workers: int | None = 1,
    baseline: bool = True,
) -> dict[str, Scores]:
    """Return the scores of the "model" and those of "copy_input", as `Scoring` does."""
    scoring = Scoring(metrics, tokenizer, workers=workers, baseline=baseline)
    for _ in scoring.measure(cases):
        pass
    return scoring.scores()


def paired(predictions: Iterable[T], rows: Iterable[Any]) -> Iterator[tuple[T, Any]]:
    """Yield predictions with the rows of the data, which are as many.

    Raises:
        UsageError: they are not.
    """
    left, right = iter(predictions), iter(rows)
    num_pairs = 0
    while True:
        prediction, row = next(left, _NONE), next(right, _NONE)
        if prediction is _NONE or row is _NONE:
            break
        num_pairs += 1
        yield prediction, row
    more = [
        num_pairs + (first is not _NONE) + sum(1 for _ in rest) for first, rest in ((prediction, left), (row, right))
    ]
    if more[0] != more[1]:
        raise UsageError(f"{more[0]:,} predictions cannot be scored against {more[1]:,} targets")


def score_with_baseline(
    rows: Sequence[PredictionRow],
    targets: Sequence[Any],
    inputs: Sequence[Any],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer = "words",
    baseline: bool = True,
) -> dict[str, Scores]:
    """Return the scores of rows in memory, as `score_cases` does."""
    pairs = paired(rows, zip(targets, inputs, strict=True))
    cases = (Case(row=row, target=target, input=text) for row, (target, text) in pairs)
    return score_cases(cases, metrics=metrics, tokenizer=tokenizer, baseline=baseline)


def score_texts(
    predictions: Sequence[str],
    targets: Sequence[str],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer = "words",
) -> Scores:
    """Return the scores of texts, as `score_cases` does those of rows."""
    rows = [PredictionRow(index=index, prediction=text) for index, text in enumerate(predictions)]
    found = score_with_baseline(rows, targets, targets, metrics=metrics, tokenizer=tokenizer, baseline=False)
    return found[MODEL]


def score_rows(
    rows: Sequence[PredictionRow], targets: Sequence[Any], inputs: Sequence[Any], *, metric: str, tokenizer: Tokenizer
) -> float:
    """Return the one value of *metric*, the mean of its `headlines`."""
    found = score_with_baseline(rows, targets, inputs, metrics=[metric], tokenizer=tokenizer, baseline=False)
    return headline(found[MODEL])


def headline(scores: Scores) -> float:
    """Return the value by which rows are compared: the mean of the `headlines`."""
    names = headlines(scores)
    return fsum(scores[name] for name in names) / len(names)


def label(score: str) -> str:
    """Return a score's name as tables show it, marked where lower is better."""
    return f"{score} (lower is better)" if is_lower_better(score) else score


def headlines(scores: Mapping[str, float]) -> list[str]:
    """Return the names of the scores less those for which an F1 stands."""
    return [name for name in scores if not name.endswith(_DETAILS)]


def _check_tokenizer(tokenizer: str) -> None:
    if tokenizer not in (known := get_args(Tokenizer)):
        hint = nearest(tokenizer, known)
        raise UsageError(
            f"tokenizer {tokenizer!r} is unknown; known: {', '.join(known)}" + (f" ({hint})" if hint else "")
        )
    if problem := tokenizer_problem(tokenizer):
        raise UsageError(f"tokenizer {tokenizer!r} {problem}")
