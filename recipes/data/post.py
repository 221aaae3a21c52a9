"""Repair predicted texts by named steps, after they were merged.

A recipe lists them in `predict.post`, in the order in which they work. A change of them needs no new prediction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UsageError, nearest
from ...files import digest_of, parse_json
from ...predictions.merge import Change
from ...predictions.rows import RAW_PREDICTION, PredictionRow
from .cleaning import TEXT_STEPS, TextStep
from .own_functions import OwnFunction
from .rows import Row

KEY = "predict.post"
_VERSION = 2  # raised when a step makes something else of the same text
# Marks that tokenizers write for their special tokens: <|im_end|>, </s>, <pad>, <extra_id_0>, [SEP].
_SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:pad|unk|bos|eos|cls|sep|mask|start_of_turn|end_of_turn|extra_id_\d+)>"
    r"|\[(?:PAD|UNK|BOS|EOS|CLS|SEP|MASK)\]"
)

POST_STEPS: dict[str, TextStep] = {
    "strip": TextStep(str.strip, "white space at both ends goes", (" a b\n", "a b")),
    "first_line": TextStep(
        lambda text: text.strip().partition("\n")[0].rstrip(),
        "what follows the first line that is not empty goes",
        ("\n답이다\n설명", "답이다"),
    ),
    "special_tokens": TextStep(
        lambda text: _SPECIAL.sub("", text), "marks of special tokens go", ("답</s><|im_end|>[PAD]", "답")
    ),
    **TEXT_STEPS,
}
REPLACE, CUT = "replace:", "cut_chars:"
_Step = Callable[[str, int, Row], str]


def is_own(name: str) -> bool:
    """Say whether an entry names the user's own function rather than a step of ours."""
    return name not in POST_STEPS and not name.startswith((REPLACE, CUT)) and (":" in name or "." in name)


def problem_of(name: str) -> tuple[str, str]:
    """Return what is wrong with an entry of `predict.post`, and a hint.

    Both are empty where nothing is.
    """
    if name.startswith(CUT):
        good = re.fullmatch(r"[1-9]\d*", name.removeprefix(CUT))
        return ("", "") if good else (f"is {name!r}, which has no number of characters", f"such as {CUT}60")
    if name in POST_STEPS or is_own(name) or (name.startswith(REPLACE) and name != REPLACE):
        return "", ""
    known = [*POST_STEPS, f"{CUT}N", f"{REPLACE}FILE"]
    hint = nearest(name, known) or f"known: {', '.join(known)}; an own function is written module:function"
    return f"is {name!r}, which is no step", hint


def files_in(post: Sequence[str]) -> list[str]:
    """Return the files of regular expressions that the steps name."""
    return [name.removeprefix(REPLACE) for name in post if name.startswith(REPLACE)]


def read_rules(path: Path, shown: str) -> list[tuple[re.Pattern[str], str]]:
    r"""Return the regular expressions of a file and what replaces each.

    A line is PATTERN, a tab, and the replacement, as Python's `re` knows them: `\1` is the first group, `\n` a newline.
    Empty lines, and those that begin with `#`, are passed over. Nothing of the file is run.

    Raises:
        UsageError: a line is no rule; the message has its number.
    """
    rules = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{KEY} {REPLACE}{shown} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        pattern, tab, replacement = line.partition("\t")
        try:
            if not tab or "\t" in replacement:
                raise ValueError("it is not a pattern, one tab, and what replaces it")
            rule = re.compile(pattern)
            rule.sub(replacement, "")  # which also reads the replacement
        except (re.error, ValueError, IndexError, OverflowError, RecursionError) as error:
            raise UsageError(f"{KEY} {REPLACE}{shown}, line {number} is no rule: {error}") from error
        rules.append((rule, replacement))
    return rules


class Post:
    """The steps of a recipe over a text, its row's number from 1, and the input row."""

    def __init__(self, names: Sequence[str], split: str, place: Callable[[str], Path] = Path) -> None:
        """Set the steps up; *place* says where a file that they name lies.

        Raises:
            UsageError: there is no such step, file or function.
        """
        self.needs_rows = False
        self._steps = [self._step(name, split, place) for name in names]

    def __call__(self, text: str, number: int, row: Row) -> str:
        """Return the repaired text.

        Raises:
            UsageError: an own function failed at the row, which is named.
        """
        for step in self._steps:
            text = step(text, number, row)
        return text

    def _step(self, name: str, split: str, place: Callable[[str], Path]) -> _Step:
        problem, hint = problem_of(name)
        if problem:
            raise UsageError(f"{KEY} {problem} ({hint})")
        if name in POST_STEPS:
            change = POST_STEPS[name].change
            return lambda text, number, row: change(text)
        if name.startswith(CUT):
            limit = int(name.removeprefix(CUT))
            return lambda text, number, row: text[:limit]
        if name.startswith(REPLACE):
            (file,) = files_in([name])
            return _replacing(read_rules(place(file), file))
        return self._own(OwnFunction(KEY, name, split))

    def _own(self, function: OwnFunction) -> _Step:
        takes_row = function.takes_chance
        self.needs_rows |= takes_row

        def step(text: str, number: int, row: Row) -> str:
            made = function(number, text, dict(row)) if takes_row else function(number, text)
            if type(made) is not str:
                function.refuse(number, made, "the repaired text")
            return str(made)

        return step


def _replacing(rules: Sequence[tuple[re.Pattern[str], str]]) -> _Step:
    def step(text: str, number: int, row: Row) -> str:
        for pattern, replacement in rules:
            text = pattern.sub(replacement, text)
        return text

    return step


def change_of(
    names: Sequence[str], split: str, digests: Mapping[str, str], place: Callable[[str], Path], rows: Iterator[Row]
) -> Change:
    """Return the change of merged rows that `predict.post` asks for.

    A row keeps the text before as `raw_prediction`. A prediction that is no text, such as none, stays. *digests* are
    those of the files and functions that the steps name, *rows* the input rows in order.
    """
    post = Post(names, split, place)
    numbered = enumerate(rows)

    def line(old: bytes, position: int) -> bytes:
        found = PredictionRow.from_json(parse_json(old), position=position)
        row = next(islice((row for at, row in numbered if at == position), 1), {}) if post.needs_rows else {}
        text = found.prediction
        new = post(text, position + 1, row) if isinstance(text, str) else text
        fields: dict[str, Any] = {RAW_PREDICTION: text, **found.fields}
        return PredictionRow(index=found.index, prediction=new, id=found.id, fields=fields).to_line()

    return Change(key=digest_of([_VERSION, list(names), dict(digests)]), line=line)
