"""Compare texts: as wholes, by characters, and by words.

| metric             | over all rows                                                        |
|--------------------|----------------------------------------------------------------------|
| character_accuracy | positions with the right character / sum of max(lengths of the two)  |
| cer                | edits (insert, delete, substitute) / characters of the targets       |
| wer                | the same with words, which are what stands between blanks            |
| exact_match        | rows that are equal / rows                                           |

Two empty texts are a full match, one empty text is none. Where the targets have no characters at all, `cer` is the
number of edits; `cer` and `wer` are the only scores without an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping

from rapidfuzz.distance import Hamming, Levenshtein

from . import Answers, Metric


def _places(answers: Answers) -> dict[str, list[float]]:
    return {
        "wrong": [Hamming.distance(text, target, pad=True) for text, target in answers.texts],
        "places": [max(len(text), len(target)) for text, target in answers.texts],
    }


def _character_accuracy(sums: Mapping[str, float]) -> dict[str, float]:
    return {"character_accuracy": 1 - sums["wrong"] / sums["places"] if sums["places"] else 1.0}


def _character_edits(answers: Answers) -> dict[str, list[float]]:
    return {
        "edits": [Levenshtein.distance(text, target) for text, target in answers.texts],
        "characters": [len(target) for _, target in answers.texts],
    }


def _word_edits(answers: Answers) -> dict[str, list[float]]:
    pairs = [(text.split(), target.split()) for text, target in answers.texts]
    return {
        "edits": [Levenshtein.distance(text, target) for text, target in pairs],
        "words": [len(target) for _, target in pairs],
    }


def _exact_match(answers: Answers) -> dict[str, list[float]]:
    return {"exact_match": [float(text == target) for text, target in answers.texts]}


CHARACTER_ACCURACY = Metric(score=_places, total=_character_accuracy, better="higher")
CER = Metric(
    score=_character_edits, total=lambda sums: {"cer": sums["edits"] / max(1, sums["characters"])}, better="lower"
)
WER = Metric(score=_word_edits, total=lambda sums: {"wer": sums["edits"] / max(1, sums["words"])}, better="lower")
EXACT_MATCH = Metric(score=_exact_match, better="higher")
