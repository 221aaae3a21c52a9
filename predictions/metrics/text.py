"""Compare texts character by character.

| metric             | over all rows                                                        |
|--------------------|----------------------------------------------------------------------|
| character_accuracy | positions with the right character / sum of max(lengths of the two)  |
| cer                | edits (insert, delete, substitute) / characters of the targets       |
| exact_match        | rows that are equal / rows                                           |

Two empty texts are a full match, one empty text is none. Where the targets have no characters at all, `cer` is
the number of edits; it is the only score without an upper bound.
"""

from __future__ import annotations

from rapidfuzz.distance import Hamming, Levenshtein

from . import Answers, Metric


def _character_accuracy(answers: Answers) -> dict[str, float]:
    num_places = sum(max(len(text), len(target)) for text, target in answers.texts)
    num_wrong = sum(Hamming.distance(text, target, pad=True) for text, target in answers.texts)
    return {"character_accuracy": 1 - num_wrong / num_places if num_places else 1.0}


def _cer(answers: Answers) -> dict[str, float]:
    num_edits = sum(Levenshtein.distance(text, target) for text, target in answers.texts)
    return {"cer": num_edits / max(1, sum(len(target) for _, target in answers.texts))}


def _exact_match(answers: Answers) -> dict[str, list[float]]:
    return {"exact_match": [float(text == target) for text, target in answers.texts]}


CHARACTER_ACCURACY = Metric(score=_character_accuracy, better="higher")
CER = Metric(score=_cer, better="lower")
EXACT_MATCH = Metric(score=_exact_match, better="higher")
