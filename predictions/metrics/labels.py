"""Compare labels: how many are right, and how well each label is found.

| metric    | over all rows                                                                  |
|-----------|--------------------------------------------------------------------------------|
| accuracy  | rows with the right label / rows                                               |
| macro_f1  | mean over the labels of their F1, as scikit-learn's `f1_score(average="macro")` |
| label_f1  | the F1 of each label: 2 TP / (2 TP + FP + FN)                                  |

The labels are those of the targets and of the predictions; one that is never found has an F1 of 0.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

from . import Answers, Metric


def label_text(value: Any) -> str:
    """Return a label as text, without blanks around it, in Unicode NFC.

    One label may be written in several types: 1, 1.0 and "1" are one, and so are true and "true".
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value)).strip()


def _pairs(answers: Answers) -> list[tuple[str, str]]:
    return [
        (label_text(row.prediction), label_text(target))
        for row, target in zip(answers.rows, answers.targets, strict=True)
    ]


def _accuracy(answers: Answers) -> dict[str, list[float]]:
    return {"accuracy": [float(found == target) for found, target in _pairs(answers)]}


def _f1_of_labels(answers: Answers) -> dict[str, float]:
    pairs = _pairs(answers)
    right = Counter(target for found, target in pairs if found == target)
    seen = Counter(label for pair in pairs for label in pair)  # 2 TP + FP + FN
    return {label: 2 * right[label] / seen[label] for label in sorted(seen)}


def _macro_f1(answers: Answers) -> dict[str, float]:
    values = _f1_of_labels(answers).values()
    return {"macro_f1": sum(values) / len(values)}


def _label_f1(answers: Answers) -> dict[str, float]:
    return {f"label_f1_{label}": value for label, value in _f1_of_labels(answers).items()}


ACCURACY = Metric(score=_accuracy, better="higher", has_baseline=False)
MACRO_F1 = Metric(score=_macro_f1, better="higher", has_baseline=False)
LABEL_F1 = Metric(score=_label_f1, better="higher", has_baseline=False)
