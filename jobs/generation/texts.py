"""Decode the text of an answer, and find where it ends."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

# An end of a sentence: marks, closing quotes and brackets, then white space; or a line's end.
_END = re.compile(r"""(?:[.!?…。！？]+["'”’」』)\]]*\s+|\n+)""")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of *ids* in Unicode NFC, without special tokens.

    It is without a blank that the tokenizer itself puts before every text, too.
    """
    text = unicodedata.normalize("NFC", tokenizer.decode(list(ids), skip_special_tokens=True))
    return text.removeprefix(" ") if text.startswith(" ") and _puts_blank(tokenizer) else text


def _puts_blank(tokenizer: Any) -> bool:
    """Say whether "1" comes back as " 1", as from a byte-level `add_prefix_space`."""
    ids = tokenizer(["1"], add_special_tokens=False)["input_ids"][0]
    return bool(tokenizer.decode(ids).startswith(" "))


def end_ids(of_model: int | Sequence[int] | None, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: those *of_model*, and its tokenizer's.

    With the latter the rows end that a model is trained on.
    """
    found = (of_model,) if isinstance(of_model, int) else tuple(of_model or ())
    return found if tokenizer.eos_token_id in (None, *found) else (*found, tokenizer.eos_token_id)


def cut(text: str, stops: Sequence[str], most_characters: int | None) -> str:
    """Return *text* up to the first of *stops*, and no longer than *most_characters*.

    Stop texts are compared in Unicode NFC, as the text is.
    """
    places = [text.find(unicodedata.normalize("NFC", stop)) for stop in stops]
    return text[: min([place for place in places if place >= 0], default=None)][:most_characters]


def num_tokens_within(tokenizer: Any, ids: Sequence[int], num_characters: int) -> int:
    """Return how many of the first *ids* have no more than *num_characters* of text."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(decode(tokenizer, ids[:middle])) <= num_characters:
            low = middle
        else:
            high = middle - 1
    return low


def last_sentences(text: str, count: int) -> int:
    """Return where the last *count* complete sentences of *text* begin.

    What follows them is unfinished. A line is a sentence too. With fewer sentences it is the beginning of the text.
    """
    ends = [found.end() for found in _END.finditer(text)]
    return ends[-count - 1] if len(ends) > count else 0
