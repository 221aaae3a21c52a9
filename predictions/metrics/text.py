"""Compare texts: by characters, as wholes, and by their words with ROUGE.

| metric             | over all rows                                                        |
|--------------------|----------------------------------------------------------------------|
| character_accuracy | positions with the right character / sum of max(lengths of the two)  |
| cer                | edits (insert, delete, substitute) / characters of the targets       |
| exact_match        | rows that are equal / rows                                           |
| rouge1, 2, L       | mean over the rows of precision, recall and F1, by `rouge_score`     |

Two empty texts are a full match, one empty text is none. Where the targets have no characters at all, `cer` is
the number of edits; it is the only score without an upper bound. ROUGE has a tokenizer of ours that keeps every
script: the usual one keeps [a-z0-9] only, and gives every Korean text 0.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace

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


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"words": tokenize_words, "characters": tokenize_characters}


def _rouge(kinds: tuple[str, ...], answers: Answers) -> dict[str, list[float]]:
    from rouge_score.rouge_scorer import RougeScorer  # 0.4 s: nltk
    from rouge_score.scoring import Score

    scorer = RougeScorer(list(kinds), tokenizer=SimpleNamespace(tokenize=TOKENIZERS[answers.tokenizer]))
    both_empty = dict.fromkeys(kinds, Score(precision=1.0, recall=1.0, fmeasure=1.0))
    rows = [scorer.score(target, text) if text or target else both_empty for text, target in answers.texts]
    values: dict[str, list[float]] = {}
    for kind in kinds:
        values[f"{kind}_precision"] = [row[kind].precision for row in rows]
        values[f"{kind}_recall"] = [row[kind].recall for row in rows]
        values[f"{kind}_f1"] = [row[kind].fmeasure for row in rows]
    return values


def _metric(*kinds: str) -> Metric:
    return Metric(score=partial(_rouge, kinds), better="higher", needs=("target", "tokenizer"))


ROUGE = _metric("rouge1", "rouge2", "rougeL")
ROUGE_1, ROUGE_2, ROUGE_L = _metric("rouge1"), _metric("rouge2"), _metric("rougeL")
