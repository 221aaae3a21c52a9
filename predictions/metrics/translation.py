"""BLEU and chrF, counted by the package `sacrebleu`.

They are shares of 1 where it prints percent.

| metric | over all rows                                                                                    |
|--------|--------------------------------------------------------------------------------------------------|
| bleu   | shared 1- to 4-grams and the lengths; words are those of `13a`, sacrebleu's usual tokenizer       |
| chrf   | F2 of shared 1- to 6-grams of characters                                                         |

With the tokenizer `characters` BLEU counts sacrebleu's `char`, with `morphemes` those of `tokenizers`.

Sources: Papineni et al. 2002, Popović 2015, Post 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from . import Answers, Metric
from .tokenizers import tokenize_morphemes

_ORDERS = range(4)
_BLEU_TOKENIZERS = {"words": "13a", "characters": "char", "morphemes": "none"}


@cache
def _sacrebleu(name: str, **options: Any) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name](**options)


def _bleu_counts(answers: Answers) -> dict[str, list[float]]:
    scorer = _sacrebleu("bleu", tokenize=_BLEU_TOKENIZERS[answers.tokenizer], effective_order=True)
    pairs: Sequence[tuple[str, str]] = answers.texts
    if answers.tokenizer == "morphemes":
        pairs = [(_joined(text), _joined(target)) for text, target in pairs]
    found = [scorer.sentence_score(text, [target]) for text, target in pairs]
    return {
        "length": [one.sys_len for one in found],
        "target_length": [one.ref_len for one in found],
        **{f"right_{order}": [one.counts[order] for one in found] for order in _ORDERS},
        **{f"all_{order}": [one.totals[order] for one in found] for order in _ORDERS},
    }


def _joined(text: str) -> str:
    return " ".join(tokenize_morphemes(text))


def _bleu(sums: Mapping[str, float]) -> dict[str, float]:
    right, every = ([int(sums[f"{what}_{order}"]) for order in _ORDERS] for what in ("right", "all"))
    lengths = {"sys_len": int(sums["length"]), "ref_len": int(sums["target_length"])}
    scorer = _sacrebleu("bleu")
    # by itself this smooths nothing, and a file in which no four words are right would have 0
    found = scorer.compute_bleu(right, every, **lengths, smooth_method=scorer.smooth_method)
    return {"bleu": found.score / 100}


def _chrf_counts(answers: Answers) -> dict[str, list[float]]:
    texts, targets = zip(*answers.texts, strict=True)
    counts = _sacrebleu("chrf")._extract_corpus_statistics(texts, [targets])
    return {str(place): list(column) for place, column in enumerate(zip(*counts, strict=True))}


def _chrf(sums: Mapping[str, float]) -> dict[str, float]:
    counts = [sums[str(place)] for place in range(len(sums))]
    return {"chrf": _sacrebleu("chrf")._compute_score_from_stats(counts).score / 100}


BLEU = Metric(score=_bleu_counts, total=_bleu, better="higher", needs=("target", "tokenizer"), packages=("sacrebleu",))
CHRF = Metric(score=_chrf_counts, total=_chrf, better="higher", packages=("sacrebleu",))
