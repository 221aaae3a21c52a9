"""ROUGE: how many words, pairs of words or subsequences two texts share.

| metric    | per row: precision, recall and F1 of                                        |
|-----------|-----------------------------------------------------------------------------|
| rouge1, 2 | the tokens, and the pairs of neighbours, that both texts have               |
| rougeL    | the longest subsequence of tokens that both have                            |
| rougeLsum | the same by sentences, which are lines: the union over those of the answer  |

The figures are those of the package `rouge_score` on the same tokens. Two empty texts are a full match.

Sources: Lin 2004; the subsequence by bit vectors, Hyyrö 2004 (`rapidfuzz`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from rapidfuzz.distance import LCSseq

from . import Answers, Metric
from .tokenizers import TOKENIZERS

Parts = tuple[float, float, float]
_FULL, _NONE = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)


def _parts(num_shared: int, num_ours: int, num_theirs: int) -> Parts:
    if not num_shared:
        return _NONE
    precision, recall = num_shared / num_ours, num_shared / num_theirs
    return precision, recall, 2 * precision * recall / (precision + recall)


def _grams(size: int, text: Sequence[str], target: Sequence[str]) -> Parts:
    ours, theirs = (
        Counter(tokens if size == 1 else zip(*(tokens[start:] for start in range(size)), strict=False))
        for tokens in (text, target)
    )
    shared, num_ours, num_theirs = ours.keys() & theirs.keys(), len(text) - size + 1, len(target) - size + 1
    if len(ours) == num_ours or len(theirs) == num_theirs:  # one text repeats nothing: each is shared once
        return _parts(len(shared), num_ours, num_theirs)
    return _parts(sum(min(ours[gram], theirs[gram]) for gram in shared), num_ours, num_theirs)


def _subsequence(text: Sequence[str], target: Sequence[str]) -> Parts:
    return _parts(LCSseq.similarity(text, target), len(text), len(target))


def _places(target: Sequence[str], text: Sequence[str]) -> set[int]:
    """Return the places in *target* of one longest subsequence that *text* has, too.

    Of several it is the one that `rouge_score` takes. Bit i of `columns[j]` is 0 where the longest subsequence with
    the first j tokens of *text* grows by token i of *target*.
    """
    full = (1 << len(target)) - 1
    where: dict[str, int] = {}
    for place, token in enumerate(target):
        where[token] = where.get(token, 0) | 1 << place
    columns = [full]
    for token in text:
        same = columns[-1] & where.get(token, 0)
        columns.append((columns[-1] + same | columns[-1] - same) & full)
    row, column, found = len(target), len(text), set[int]()
    while row and column:
        if target[row - 1] == text[column - 1]:
            row, column = row - 1, column - 1
            found.add(row)
            continue
        below = (1 << row) - 1
        left = row - (columns[column - 1] & below).bit_count()
        above = row - 1 - (columns[column] & below >> 1).bit_count()
        if left > above:
            column -= 1
        else:
            row -= 1
    return found


def _summary(text: Sequence[Sequence[str]], target: Sequence[Sequence[str]]) -> Parts:
    """Return the parts of ROUGE-Lsum.

    No token counts more often than either text has it.
    """
    ours, theirs = (Counter(token for line in lines for token in line) for lines in (text, target))
    num_shared, left = 0, ours & theirs
    for line in target:
        for place in sorted(set[int]().union(*(_places(line, other) for other in text))):
            if left[line[place]] > 0:
                left[line[place]] -= 1
                num_shared += 1
    return _parts(num_shared, ours.total(), theirs.total())


_OF_TOKENS: dict[str, Callable[[Sequence[str], Sequence[str]], Parts]] = {
    "rouge1": partial(_grams, 1),
    "rouge2": partial(_grams, 2),
    "rougeL": _subsequence,
}


def _by_lines(answers: Answers) -> list[tuple[list[list[str]], list[list[str]]]]:
    split = TOKENIZERS[answers.tokenizer]
    return [
        ([split(line) for line in text.split("\n") if line], [split(line) for line in target.split("\n") if line])
        for text, target in answers.texts
    ]


def _rouge(kinds: tuple[str, ...], answers: Answers) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for kind in kinds:
        if kind == "rougeLsum":
            found = [_summary(*pair) for pair in _by_lines(answers)]
        else:
            found = [_OF_TOKENS[kind](*pair) for pair in answers.tokens]
        found = [parts if text or target else _FULL for parts, (text, target) in zip(found, answers.texts, strict=True)]
        for name, column in zip(("precision", "recall", "f1"), zip(*found, strict=True), strict=True):
            values[f"{kind}_{name}"] = list(column)
    return values


def _metric(*kinds: str) -> Metric:
    return Metric(score=partial(_rouge, kinds), better="higher", needs=("target", "tokenizer"))


ROUGE = _metric("rouge1", "rouge2", "rougeL")
ROUGE_1, ROUGE_2, ROUGE_L, ROUGE_LSUM = (_metric(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"))
