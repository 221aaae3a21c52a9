"""Split texts into the units that ROUGE, WER and BLEU count.

All keep the letters, marks and digits of every script. The usual tokenizer of ROUGE keeps [a-z0-9] only, and gives
every Korean text 0.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

from ...errors import UsageError

Tokenizer = Literal["words", "characters", "morphemes"]
_SIGNS = ("S", "W")  # beginnings of Kiwi's tags of punctuation, and of addresses such as W_URL
_WORDS = ("SL", "SH", "SN", "W")  # foreign letters, Chinese characters, numbers, addresses


class _Table(dict[int, str]):
    """Replace what belongs to no word by a blank; characters are looked up once."""

    def __missing__(self, code: int) -> str:
        # Marks belong to words: without them "हिन्दी" falls into pieces, as it does with \w.
        character = chr(code)
        kept = self[code] = character if unicodedata.category(character)[0] in "LMN" else " "
        return kept


_TABLE = _Table()


def tokenize_words(text: str) -> list[str]:
    """Return the runs of letters, marks and digits of any script, in lower case."""
    words: list[str] = []
    for word in text.lower().split():
        if word.isalnum():  # the usual case, five times as fast
            words.append(word)
        else:
            words += word.translate(_TABLE).split()
    return words


def tokenize_characters(text: str) -> list[str]:
    """Return the letters, marks and digits one by one: for scripts without spaces."""
    return list("".join(tokenize_words(text)))


def tokenize_morphemes(text: str) -> list[str]:
    """Return the Korean morphemes, in lower case, without punctuation.

    Kiwi finds them (package `kiwipiepy`).

    Raises:
        UsageError: the package is not installed.
    """
    return [
        token.form
        for token in _kiwi().tokenize(text.lower())
        if not token.tag.startswith(_SIGNS) or token.tag.startswith(_WORDS)
    ]


def tokenizer_problem(name: str) -> str:
    """Return why a known tokenizer cannot be used here, or nothing."""
    if name == "morphemes" and find_spec("kiwipiepy") is None:
        return "needs kiwipiepy: pip install 'sousbatch[scoring]'"
    return ""


@cache
def _kiwi() -> Any:
    if problem := tokenizer_problem("morphemes"):
        raise UsageError(f"tokenizer 'morphemes' {problem}")
    from kiwipiepy import Kiwi

    return Kiwi(num_workers=1)  # the processes of scoring share the cores


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "words": tokenize_words,
    "characters": tokenize_characters,
    "morphemes": tokenize_morphemes,
}
