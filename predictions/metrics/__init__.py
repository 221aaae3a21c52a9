"""The metrics of predictions: one record per metric, found by its name.

To add a metric: a `Metric` in a file here, and one row in `METRICS`. The recipe key `score.metrics` and
`predictions score --metric` then take its name, and tests/predictions/test_metrics_contract.py tests it.
A metric of a third-party package is an entry point of the group `sousbatch.metrics` that names such a record.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ...plugins import Registry
from ..rows import PredictionRow

Tokenizer = Literal["words", "characters"]
Need = Literal["target", "input", "tokenizer"]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Texts to measure: predictions and, at the same positions, targets and inputs."""

    rows: Sequence[PredictionRow]
    targets: Sequence[Any]
    inputs: Sequence[Any]
    tokenizer: Tokenizer

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """The pairs of prediction and target as texts in Unicode NFC."""
        return [
            (unicodedata.normalize("NFC", str(row.prediction)), unicodedata.normalize("NFC", str(target)))
            for row, target in zip(self.rows, self.targets, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to measure predictions.

    *score* returns values by name; the name is that of a metric, alone or followed by `_` and more. A value is a
    number over all rows, or a list with a number for each row, whose mean is the score. *better* says which values
    are good. *needs* lists what it reads besides the predictions, *fields* what a task must have added to each row.
    Without *has_baseline* copying the input says nothing, and is not measured.
    """

    score: Callable[[Answers], Mapping[str, float | Sequence[float]]]
    better: Literal["higher", "lower"]
    needs: tuple[Need, ...] = ("target",)
    fields: tuple[str, ...] = ()
    has_baseline: bool = True


METRICS: Registry[Metric] = Registry(
    "metric",
    "sousbatch.metrics",
    {
        "character_accuracy": "predictions.metrics.text:CHARACTER_ACCURACY",
        "cer": "predictions.metrics.text:CER",
        "exact_match": "predictions.metrics.text:EXACT_MATCH",
        "accuracy": "predictions.metrics.labels:ACCURACY",
        "macro_f1": "predictions.metrics.labels:MACRO_F1",
        "label_f1": "predictions.metrics.labels:LABEL_F1",
        "rouge": "predictions.metrics.text:ROUGE",
        "rouge1": "predictions.metrics.text:ROUGE_1",
        "rouge2": "predictions.metrics.text:ROUGE_2",
        "rougeL": "predictions.metrics.text:ROUGE_L",
        "squad_em": "predictions.metrics.question_answering:SQUAD_EM",
        "squad_f1": "predictions.metrics.question_answering:SQUAD_F1",
        "korquad_em": "predictions.metrics.question_answering:KORQUAD_EM",
        "korquad_f1": "predictions.metrics.question_answering:KORQUAD_F1",
    },
    of=Metric,
)
DEFAULT_METRICS = ("character_accuracy", "cer", "exact_match", "rouge")
