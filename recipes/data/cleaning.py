"""Clean texts by named steps, and name the filters of rows.

A recipe lists them in `data.clean`, in the order in which they work.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import nearest


@dataclass(frozen=True)
class TextStep:
    """A change of a text, what it does, and one example: a text before and after."""

    change: Callable[[str], str]
    does: str
    example: tuple[str, str]


# Control characters other than tab and line feed, and what has no width. The joiners U+200C and U+200D stay: emoji and
# several scripts are written with them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_MARKUP = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[A-Za-z][^<>]*>", re.DOTALL | re.IGNORECASE)
# ASCII alone: a Korean particle follows an address without a space.
_URL = re.compile(r"(?:https?://|www\.)[!-~]+", re.IGNORECASE)
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")
# Arrows, technical signs, frames, shapes, dingbats, emoji, private use and the sign of a broken character. Units, money
# and punctuation stay. So do joiners between letters; one between two emoji, and the tags of a flag, go with these.
_SYMBOLS = (
    "[\u20e3\u2190-\u21ff\u2300-\u23ff\u2400-\u243f\u2500-\u27bf\u2b00-\u2bff\u3012\u3013\u3020"
    "\ue000-\uf8ff\ufe0e\ufe0f\ufffd\U0001f000-\U0001faff\U000e0020-\U000e007f]+"
)
_SYMBOL = re.compile(f"{_SYMBOLS}(?:\u200d{_SYMBOLS})*")
_REPEAT = re.compile(r"([^\d\s])\1{3,}")
_BLANK = re.compile(r"[^\S\n]+")
_AROUND_BREAK = re.compile(r" ?\n ?")
_BREAKS = re.compile(r"\n{3,}")


def _without_control(text: str) -> str:
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _without_blanks(text: str) -> str:
    return _BREAKS.sub("\n\n", _AROUND_BREAK.sub("\n", _BLANK.sub(" ", text))).strip()


TEXT_STEPS: dict[str, TextStep] = {
    "unicode": TextStep(
        lambda text: unicodedata.normalize("NFC", text),
        "Unicode NFC: one way of writing each character",
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", "한글"),
    ),
    "control": TextStep(
        _without_control, "control characters and those without width go", ("a\u200bb\x07c\r\nd", "abc\nd")
    ),
    "html": TextStep(
        lambda text: html.unescape(_MARKUP.sub(" ", text)),
        "tags become a blank, entities their character",
        ("5 &lt; 6<br>R&amp;D", "5 < 6 R&D"),
    ),
    "urls": TextStep(
        lambda text: _URL.sub("", text), "web addresses go", ("자세히 https://a.kr/b?c=1에서", "자세히 에서")
    ),
    "emails": TextStep(
        lambda text: _EMAIL.sub("", text), "mail addresses go", ("문의 kim@example.com 까지", "문의  까지")
    ),
    "symbols": TextStep(
        lambda text: _SYMBOL.sub("", text),
        "shapes, arrows, dingbats and emoji go; punctuation, units and money stay",
        ("★강추★ 3㎡, 5만원!▶", "강추 3㎡, 5만원!"),
    ),
    "repeats": TextStep(
        lambda text: _REPEAT.sub(r"\1\1\1", text),
        "a character more than three times in a row stays three times; digits stay",
        ("ㅋㅋㅋㅋㅋ 좋아요!!!!! 10000", "ㅋㅋㅋ 좋아요!!! 10000"),
    ),
    "blanks": TextStep(
        _without_blanks,
        "blanks become one, empty lines at most one; none at the ends",
        ("  a \t b\n\n\n\nc ", "a b\n\nc"),
    ),
}

# Filters take rows as a whole; the two that end in a colon are followed by a number.
FILTERS = ("drop_empty", "drop_duplicates", "min_chars:", "max_chars:")


def is_own(name: str) -> bool:
    """Say whether an entry names the user's own function rather than a step of ours."""
    return name not in TEXT_STEPS and not name.startswith(FILTERS) and (":" in name or "." in name)


def problem_of(name: str) -> tuple[str, str]:
    """Return what is wrong with an entry of `data.clean`, and a hint.

    Both are empty where nothing is.
    """
    word, _, number = name.partition(":")
    if name in TEXT_STEPS or name in FILTERS[:2] or is_own(name):
        return "", ""
    if f"{word}:" in FILTERS:
        good = re.fullmatch(r"[1-9]\d*", number)
        return ("", "") if good else (f"is {name!r}, which has no number of characters", f"such as {word}:10")
    known = [*TEXT_STEPS, *FILTERS]
    hint = nearest(name, known) or f"known: {', '.join(known)}; an own function is written module:function"
    return f"is {name!r}, which is no step", hint


def filter_of(name: str) -> Callable[[Sequence[str]], bool]:
    """Return what says whether a row stays, from its texts.

    The filter of duplicates remembers 16 bytes of each row that it has seen.
    """
    word, _, number = name.partition(":")
    if word == "drop_duplicates":
        return _FirstOfItsKind()
    limit = int(number or 0)
    tests: dict[str, Callable[[Sequence[str]], bool]] = {
        "drop_empty": lambda texts: all(text.strip() for text in texts),
        "min_chars": lambda texts: sum(map(len, texts)) >= limit,
        "max_chars": lambda texts: sum(map(len, texts)) <= limit,
    }
    return tests[word]


class _FirstOfItsKind:
    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, texts: Sequence[str]) -> bool:
        digest = hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=16).digest()
        is_new = digest not in self._seen
        self._seen.add(digest)
        return is_new
