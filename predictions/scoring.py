"""Score predictions against targets, beside the score of copying the input.

What a metric measures is its own (`metrics`); here its values become scores. Cleaning texts is another step's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import fsum
from typing import Any, get_args

from ..errors import UsageError, nearest
from .metrics import DEFAULT_METRICS, METRICS, Answers, Metric, Tokenizer
from .rows import PredictionRow

Scores = dict[str, float]
MODEL, BASELINE = "model", "copy_input"
WHO = {MODEL: "model", BASELINE: "copying the input"}  # how tables call them
_DETAILS = ("_precision", "_recall")


def score_with_baseline(
    rows: Sequence[PredictionRow],
    targets: Sequence[Any],
    inputs: Sequence[Any],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer = "words",
) -> dict[str, Scores]:
    """Return the scores of the "model" and those of "copy_input".

    An input is None where a row has none; where no row has one, there is no "copy_input". A metric that needs fields
    of a task has no score for the copied input.

    Raises:
        UsageError: there is nothing to score, the numbers of rows differ, a metric or tokenizer is unknown, or a
            row lacks what a metric needs.
    """
    _check(rows, targets, tokenizer)
    answers = Answers(rows=rows, targets=targets, inputs=inputs, tokenizer=tokenizer)
    chosen = _loaded(metrics, answers)
    copied = [
        PredictionRow(index=row.index, prediction="" if text is None else text)
        for row, text in zip(rows, inputs, strict=True)
    ]
    scores = {MODEL: _scores(answers, chosen)}
    of_texts = {name: metric for name, metric in chosen.items() if metric.has_baseline and not metric.fields}
    if of_texts and any(text is not None for text in inputs):
        scores[BASELINE] = _scores(replace(answers, rows=copied), of_texts)
    return scores


def score_texts(
    predictions: Sequence[str],
    targets: Sequence[str],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: Tokenizer = "words",
) -> Scores:
    """Return the scores of texts, as `score_with_baseline` does those of rows."""
    rows = [PredictionRow(index=index, prediction=text) for index, text in enumerate(predictions)]
    _check(rows, targets, tokenizer)
    answers = Answers(rows=rows, targets=targets, inputs=targets, tokenizer=tokenizer)
    return _scores(answers, _loaded(metrics, answers))


def score_rows(
    rows: Sequence[PredictionRow], targets: Sequence[Any], inputs: Sequence[Any], *, metric: str, tokenizer: Tokenizer
) -> float:
    """Return the one value of *metric*, the mean of its `headlines`."""
    _check(rows, targets, tokenizer)
    answers = Answers(rows=rows, targets=targets, inputs=inputs, tokenizer=tokenizer)
    scores = _scores(answers, _loaded([metric], answers))
    names = headlines(scores)
    return fsum(scores[name] for name in names) / len(names)


def label(score: str) -> str:
    """Return a score's name as tables show it, marked where lower is better."""
    words = score.split("_")
    name = METRICS.first_known(["_".join(words[:count]) for count in range(len(words), 0, -1)])
    with suppress(UsageError):  # a third-party metric that cannot be imported now; its scores are still shown
        if name is not None and METRICS.load(name).better == "lower":
            return f"{score} (lower is better)"
    return score


def headlines(scores: Mapping[str, float]) -> list[str]:
    """Return the names of the scores less those for which an F1 stands."""
    return [name for name in scores if not name.endswith(_DETAILS)]


def _scores(answers: Answers, metrics: Mapping[str, Metric]) -> Scores:
    scores: Scores = {}
    for metric_name, metric in metrics.items():
        try:
            found = metric.score(answers)
        except Exception as error:  # whatever a third-party metric raises, its name is what a user can act on
            raise UsageError(f"metric {metric_name!r} failed: {type(error).__name__}: {error}") from error
        for name, value in found.items():
            scores[name] = fsum(value) / len(value) if isinstance(value, Sequence) else value
    return scores


def _check(rows: Sequence[PredictionRow], targets: Sequence[Any], tokenizer: str) -> None:
    if len(rows) != len(targets):
        raise UsageError(f"{len(rows):,} predictions cannot be scored against {len(targets):,} targets")
    if not rows:
        raise UsageError("there are no predictions to score")
    if tokenizer not in (known := get_args(Tokenizer)):
        hint = nearest(tokenizer, known)
        raise UsageError(
            f"tokenizer {tokenizer!r} is unknown; known: {', '.join(known)}" + (f" ({hint})" if hint else "")
        )


def _loaded(names: Sequence[str], answers: Answers) -> dict[str, Metric]:
    metrics = {name: METRICS.load(name) for name in names}
    for name, metric in metrics.items():
        _check_needs(name, metric, answers)
    return metrics


def _check_needs(name: str, metric: Metric, answers: Answers) -> None:
    if "input" in metric.needs and None in answers.inputs:
        raise UsageError(f"metric {name!r} needs the input of each row; row {answers.inputs.index(None)} has none")
    for row in answers.rows if metric.fields else ():
        if missing := [field for field in metric.fields if field not in row.fields]:
            has = ", ".join(row.fields) or "none"
            raise UsageError(
                f"metric {name!r} needs the field {missing[0]!r} of a prediction; row {row.index} has {has}"
            )
