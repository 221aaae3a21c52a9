"""Select rows by BM25, and draw a sample of them."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Collection, Sequence

from ...errors import UsageError
from ..schema import Bm25

_WORD = re.compile(r"\w+")
# Hangul, kana and the Han characters: they are searched by pairs, as Elasticsearch's `cjk` analyser does, since a word
# has no end in them, or has particles at it.
_PAIRED = re.compile(r"[\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7a3]+")


def search_terms(text: str, singles: Collection[str] = ()) -> list[str]:
    """Return the terms of a text.

    They are words in lower case, and pairs of characters in Korean, Japanese and Chinese. Characters among *singles*,
    those that a query has alone, are terms by themselves too.
    """
    terms = []
    for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        pairs = _PAIRED.findall(word)
        terms += [run[at : at + 2] for run in pairs for at in range(max(1, len(run) - 1))]
        terms += [sign for run in pairs if len(run) > 1 for sign in run if sign in singles]
        terms += _PAIRED.sub(" ", word).split() if pairs else [word]
    return terms


def singles_of(spec: Bm25) -> set[str]:
    """Return the characters that stand alone in a query.

    Such as a Korean word of one syllable.
    """
    return {term for query in spec.queries for term in search_terms(query) if len(term) == 1}


def best_rows(spec: Bm25, texts: Sequence[list[str]]) -> list[set[int]]:
    """Return the positions of the best rows of each query.

    *texts* are the terms of each row. Of rows with the same score the first ones are taken. A row without any term of
    the query is never taken.

    Raises:
        UsageError: the library is not installed, or a query finds no row.
    """
    try:
        import bm25s
    except ImportError as error:
        raise UsageError("data.select.bm25 needs bm25s: pip install bm25s, or sousbatch[data]") from error
    words = {word for terms in texts for word in terms}
    index = bm25s.BM25()
    if words:
        index.index(list(texts), show_progress=False)
    found = []
    for query in spec.queries:
        terms = [term for term in dict.fromkeys(search_terms(query)) if term in words]
        scores = index.get_scores(terms).tolist() if terms else []
        order = sorted((at for at, score in enumerate(scores) if score > 0), key=lambda at: -scores[at])
        if not order:
            raise UsageError(
                f"data.select.bm25: no row has a word of the query {query!r}; write another, or leave it out"
            )
        found.append(set(order[: spec.k]))
    return found


def sample_of(num_rows: int, size: int, seed: int) -> set[int]:
    """Return *size* positions of *num_rows*, all where there are no more."""
    return set(random.Random(seed).sample(range(num_rows), min(size, num_rows)))
