"""Score predicted texts against references, always beside the copied input.

Texts are compared after Unicode normalisation (NFC), and otherwise as they are: cleaning
them is another step's. The tokenizer is ours, since the usual one keeps [a-z0-9] only and
gives every Korean text a ROUGE of 0. All scores are fractions between 0 and 1 but `cer`,
which has no upper bound.

| metric             | over all rows                                                        |
|--------------------|----------------------------------------------------------------------|
| character_accuracy | positions with the right character / sum of max(lengths of the two)  |
| cer                | edits (insert, delete, substitute) / characters of the references    |
| exact_match        | rows that are equal / rows                                           |
| rouge1, 2, L       | mean over the rows of precision, recall and F1, by `rouge_score`     |

Edge cases: two empty texts are a full match in every metric, one empty text is none; where
the references have no characters at all, `cer` is the number of edits. The F1 of KorQuAD
is `rouge1_f1` with characters as tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import fmean
from types import SimpleNamespace
from typing import Literal, get_args

from rapidfuzz.distance import Hamming, Levenshtein

from ..errors import UsageError, nearest

Metric = Literal["character_accuracy", "cer", "exact_match", "rouge1", "rouge2", "rougeL"]
Tokenizer = Literal["words", "characters"]


def score_with_baseline(
    predictions: Sequence[str],
    references: Sequence[str],
    inputs: Sequence[str],
    *,
    metrics: Sequence[Metric],
    tokenizer: Tokenizer = "words",
) -> dict[str, dict[str, float]]:
    """Return the scores of the "model", and those of "copy_input": what no work at all earns."""
    return {
        who: score_texts(texts, references, metrics=metrics, tokenizer=tokenizer)
        for who, texts in (("model", predictions), ("copy_input", inputs))
    }


def score_texts(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    metrics: Sequence[Metric],
    tokenizer: Tokenizer = "words",
) -> dict[str, float]:
    """Return each metric's score; a ROUGE metric gives `_precision`, `_recall` and `_f1`.

    Raises:
        UsageError: there is nothing to score, the numbers of texts differ, or a metric or
            tokenizer is unknown.
    """
    _check(predictions, references, metrics, tokenizer)
    pairs = [(_normal(text), _normal(reference)) for text, reference in zip(predictions, references, strict=True)]
    scores = {metric: score(pairs) for metric, score in _SIMPLE.items() if metric in metrics}
    if rouge := [metric for metric in metrics if metric not in _SIMPLE]:
        scores |= _rouge(pairs, rouge, tokenizer)
    return scores


def _check(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str], tokenizer: str) -> None:
    if len(predictions) != len(references):
        raise UsageError(f"{len(predictions):,} texts cannot be scored against {len(references):,} references")
    if not predictions:
        raise UsageError("there are no predictions to score")
    for what, word, known in (
        *(("metric", metric, get_args(Metric)) for metric in metrics),
        ("tokenizer", tokenizer, get_args(Tokenizer)),
    ):
        if word not in known:
            hint = nearest(word, known)
            raise UsageError(f"{what} {word!r} is unknown; known: {', '.join(known)}" + (f" ({hint})" if hint else ""))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


_Pairs = Sequence[tuple[str, str]]


def _character_accuracy(pairs: _Pairs) -> float:
    num_places = sum(max(len(text), len(reference)) for text, reference in pairs)
    num_wrong = sum(Hamming.distance(text, reference, pad=True) for text, reference in pairs)
    return 1 - num_wrong / num_places if num_places else 1.0


def _cer(pairs: _Pairs) -> float:
    num_edits = sum(Levenshtein.distance(text, reference) for text, reference in pairs)
    return num_edits / max(1, sum(len(reference) for _, reference in pairs))


def _exact_match(pairs: _Pairs) -> float:
    return fmean(text == reference for text, reference in pairs)


_SIMPLE: dict[str, Callable[[_Pairs], float]] = {
    "character_accuracy": _character_accuracy,
    "cer": _cer,
    "exact_match": _exact_match,
}


@lru_cache(maxsize=1 << 16)
def _is_word_character(character: str) -> bool:
    # Marks belong to words: without them "हिन्दी" falls into pieces, as it does with \w.
    return unicodedata.category(character)[0] in "LMN"


def tokenize_words(text: str) -> list[str]:
    """Return the runs of letters, marks and digits of any script, in lower case."""
    return "".join(c if _is_word_character(c) else " " for c in text.lower()).split()


def tokenize_characters(text: str) -> list[str]:
    """Return the letters, marks and digits one by one: for scripts without spaces."""
    return [c for c in text.lower() if _is_word_character(c)]


_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "words": tokenize_words,
    "characters": tokenize_characters,
}


def _rouge(pairs: _Pairs, metrics: Sequence[str], tokenizer: str) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer  # 0.4 s: nltk
    from rouge_score.scoring import Score

    scorer = RougeScorer(metrics, tokenizer=SimpleNamespace(tokenize=_TOKENIZERS[tokenizer]))
    both_empty = dict.fromkeys(metrics, Score(precision=1.0, recall=1.0, fmeasure=1.0))
    rows = [scorer.score(reference, text) if text or reference else both_empty for text, reference in pairs]
    scores: dict[str, float] = {}
    for metric in metrics:
        precisions, recalls, f1s = zip(*(row[metric] for row in rows), strict=True)
        scores[f"{metric}_precision"] = fmean(precisions)
        scores[f"{metric}_recall"] = fmean(recalls)
        scores[f"{metric}_f1"] = fmean(f1s)
    return scores
