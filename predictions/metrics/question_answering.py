"""Measure answers to questions as the scripts of SQuAD and of KorQuAD 1.0 do.

| metric      | per row, the best over its right answers                                               |
|-------------|----------------------------------------------------------------------------------------|
| squad_em    | 1 where the normalised texts are equal, else 0                                         |
| squad_f1    | F1 over words                                                                          |
| korquad_em  | the same, normalised as in KorQuAD: quotes and brackets are blanks, articles stay      |
| korquad_f1  | F1 over characters, blanks left out                                                    |

The scripts print the mean in percent; here it is a share. SQuAD 1.1 and 2.0 differ for right answers that are nothing
but articles or punctuation: a file in which some question has no answer is measured as 2.0 does, another as 1.1 does.

Sources: Rajpurkar et al. 2016 and 2018, Lim et al. 2019, and their evaluation scripts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from . import Answers, Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_KORQUAD_BLANKS = str.maketrans(dict.fromkeys("'\"《》<>〈〉()‘’", " "))


def answer_texts(target: Any) -> list[str]:
    """Return the right answers of a row, none for a question without answer.

    A target is a text, a list of texts or of {"text": ...}, or {"text": [...]} as `datasets` writes it.
    """
    if isinstance(target, Mapping):
        target = target.get("text", ())
    if isinstance(target, str) or not isinstance(target, Sequence):
        target = () if target is None else [target]
    texts = [str(one.get("text", "") if isinstance(one, Mapping) else one) for one in target]
    return [text for text in texts if text]


def _squad_normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _korquad_normalised(text: str) -> str:
    return " ".join(text.translate(_KORQUAD_BLANKS).lower().translate(_NO_PUNCTUATION).split())


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    same = sum((Counter(ours) & Counter(theirs)).values())
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _best(
    answers: Answers,
    normalised: Callable[[str], str],
    compare: Callable[[str, str], float],
    *,
    leaves_out_empty: bool = False,
) -> list[float]:
    """Return for each row how well the prediction fits the best of its right answers.

    A question without answer is right where nothing is left of the prediction.
    """
    found = []
    for row, target in zip(answers.rows, answers.targets, strict=True):
        text = normalised(str(row.prediction))
        right = [normalised(one) for one in answer_texts(target)]
        if leaves_out_empty:
            right = [one for one in right if one]
        found.append(max((compare(text, one) for one in right), default=float(not text)))
    return found


def _is_equal(text: str, target: str) -> float:
    return float(text == target)


def _word_f1(text: str, target: str) -> float:
    return _f1(text.split(), target.split())


def _character_f1(text: str, target: str) -> float:
    return _f1(text.replace(" ", ""), target.replace(" ", ""))


def _squad(compare: Callable[[str, str], float], answers: Answers) -> dict[str, list[float]]:
    return {
        "first": _best(answers, _squad_normalised, compare),
        "second": _best(answers, _squad_normalised, compare, leaves_out_empty=True),
        "unanswerable": [float(not answer_texts(target)) for target in answers.targets],
        "rows": [1.0] * len(answers.rows),
    }


def _by_version(name: str, sums: Mapping[str, float]) -> dict[str, float]:
    return {name: sums["second" if sums["unanswerable"] else "first"] / sums["rows"]}


def _korquad(name: str, compare: Callable[[str, str], float], answers: Answers) -> dict[str, list[float]]:
    return {name: _best(answers, _korquad_normalised, compare)}


def _squad_metric(name: str, compare: Callable[[str, str], float]) -> Metric:
    return Metric(score=partial(_squad, compare), total=partial(_by_version, name), better="higher")


SQUAD_EM = _squad_metric("squad_em", _is_equal)
SQUAD_F1 = _squad_metric("squad_f1", _word_f1)
KORQUAD_EM = Metric(score=partial(_korquad, "korquad_em", _is_equal), better="higher")
KORQUAD_F1 = Metric(score=partial(_korquad, "korquad_f1", _character_f1), better="higher")
