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
from collections.abc import Mapping
from math import fsum
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
    return [(label_text(prediction), label_text(target)) for prediction, target in answers.values]


def _accuracy(answers: Answers) -> dict[str, list[float]]:
    return {"accuracy": [float(found == target) for found, target in _pairs(answers)]}


def _labels(answers: Answers) -> dict[str, list[str | None]]:
    pairs = _pairs(answers)
    return {
        "found": [found for found, _ in pairs],
        "target": [target for _, target in pairs],
        "right": [target if found == target else None for found, target in pairs],
    }


def _f1_of_labels(counts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    found, target, right = (counts[name] for name in ("found", "target", "right"))
    return {
        label: 2 * right.get(label, 0) / (found.get(label, 0) + target.get(label, 0))
        for label in sorted(found.keys() | target.keys())
    }


def _macro_f1(counts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    values = _f1_of_labels(counts).values()
    return {"macro_f1": fsum(values) / len(values)}


def _label_f1(counts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"label_f1_{label}": value for label, value in _f1_of_labels(counts).items()}


ACCURACY = Metric(score=_accuracy, better="higher", has_baseline=False)
MACRO_F1 = Metric(score=_labels, total=_macro_f1, better="higher", has_baseline=False)
LABEL_F1 = Metric(score=_labels, total=_label_f1, better="higher", has_baseline=False)
