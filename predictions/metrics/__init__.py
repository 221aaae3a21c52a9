"""The metrics of predictions: one record per metric, found by its name.

To add a metric: a `Metric` in a file here, and one row in `METRICS`. The recipe key `score.metrics` and
`predictions score --metric` then take its name, and tests/predictions/test_metrics_contract.py tests it.
A metric of a third-party package is an entry point of the group `sousbatch.metrics` that names such a record, and one
of the user's own code is `module:NAME`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal

from ...errors import UsageError
from ...plugins import Registry
from ..rows import PredictionRow
from .tokenizers import TOKENIZERS, Tokenizer

Need = Literal["target", "input", "tokenizer"]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A block of rows to measure.

    Targets and inputs stand at the positions of their predictions.
    """

    rows: Sequence[PredictionRow]
    targets: Sequence[Any]
    inputs: Sequence[Any]
    tokenizer: Tokenizer

    @cached_property
    def values(self) -> list[tuple[Any, Any]]:
        """The pairs of prediction and target, which are texts, numbers or booleans.

        Raises:
            UsageError: one is a list or an object.
        """
        pairs = [(row.prediction, target) for row, target in zip(self.rows, self.targets, strict=True)]
        for row, pair in zip(self.rows, pairs, strict=True):
            for what, value in zip(("prediction", "target"), pair, strict=True):
                if isinstance(value, (list, dict)):
                    raise UsageError(
                        f"compares texts, and the {what} of row {row.index} is {str(value)[:80]}; squad_em and "
                        "squad_f1 take the best of several targets"
                    )
        return pairs

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """The pairs of prediction and target as texts in Unicode NFC."""
        return [
            (unicodedata.normalize("NFC", str(prediction)), unicodedata.normalize("NFC", str(target)))
            for prediction, target in self.values
        ]

    @cached_property
    def tokens(self) -> list[tuple[list[str], list[str]]]:
        """The same pairs, split by the tokenizer."""
        split = TOKENIZERS[self.tokenizer]
        return [(split(text), split(target)) for text, target in self.texts]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to measure predictions.

    *score* gets a block of rows, and returns columns by name: lists with a value for each row. A score is the mean of
    a column; the column's name is that of the metric, alone or followed by `_` and more. A score that is no such mean
    has *total*: it gets {column: its sum over all rows}, and returns the scores by name. A column of texts has counts
    as its sum, {text: rows with it}, without None. *better* says which scores are good. *needs* lists what *score*
    reads besides the predictions, *fields* what a task must have added to each row. Without *has_baseline* copying the
    input says nothing, and is not measured. *packages* are those that it imports, beside ours.
    """

    score: Callable[[Answers], Mapping[str, Sequence[Any]]]
    better: Literal["higher", "lower"]
    total: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None
    needs: tuple[Need, ...] = ("target",)
    fields: tuple[str, ...] = ()
    has_baseline: bool = True
    packages: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """Why it cannot be used here, or nothing."""
        missing = [name for name in self.packages if find_spec(name) is None]
        return f"needs {missing[0]}: pip install 'sousbatch[scoring]'" if missing else ""


METRICS: Registry[Metric] = Registry(
    "metric",
    "sousbatch.metrics",
    {
        "character_accuracy": "predictions.metrics.text:CHARACTER_ACCURACY",
        "cer": "predictions.metrics.text:CER",
        "wer": "predictions.metrics.text:WER",
        "exact_match": "predictions.metrics.text:EXACT_MATCH",
        "accuracy": "predictions.metrics.labels:ACCURACY",
        "macro_f1": "predictions.metrics.labels:MACRO_F1",
        "label_f1": "predictions.metrics.labels:LABEL_F1",
        "rouge": "predictions.metrics.rouge:ROUGE",
        "rouge1": "predictions.metrics.rouge:ROUGE_1",
        "rouge2": "predictions.metrics.rouge:ROUGE_2",
        "rougeL": "predictions.metrics.rouge:ROUGE_L",
        "rougeLsum": "predictions.metrics.rouge:ROUGE_LSUM",
        "bleu": "predictions.metrics.translation:BLEU",
        "chrf": "predictions.metrics.translation:CHRF",
        "squad_em": "predictions.metrics.question_answering:SQUAD_EM",
        "squad_f1": "predictions.metrics.question_answering:SQUAD_F1",
        "korquad_em": "predictions.metrics.question_answering:KORQUAD_EM",
        "korquad_f1": "predictions.metrics.question_answering:KORQUAD_F1",
    },
    of=Metric,
    takes_paths=True,
)
DEFAULT_METRICS = ("character_accuracy", "cer", "exact_match", "rouge")


def metric_of(score: str) -> str | None:
    """Return the name of the metric that a score is of, None where none is known.

    That of "rouge1_f1" is "rouge1".
    """
    words = score.rpartition("/")[2].split("_")
    return METRICS.first_known(["_".join(words[:count]) for count in range(len(words), 0, -1)])


def is_lower_better(score: str) -> bool:
    """Say whether lower values of a score are better.

    Of one that is not known here they are not.
    """
    name = metric_of(score)
    with suppress(UsageError):  # a third-party metric that cannot be imported now
        return name is not None and METRICS.load(name).better == "lower"
    return False
