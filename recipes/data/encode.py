"""Turn rows into token ids, in one way for planning, training and predicting.

A row is its prompt, padding, a separator, the response and the end token. The tokenizer is one of transformers, or
the light one of `tokenizer`; this module imports neither.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..schema import Columns
from ..schema import Data as DataSpec
from .chat import RowFault, render, with_context
from .prompts import CHAT, TEMPLATES, has_turns
from .rows import Row

BATCH_ROWS = 1000  # that are tokenised at once: enough to keep every core busy, and some MB of memory


Span = tuple[int, int]  # positions in the ids: the first, and the one after the last


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: token ids, and the spans of them that count in the loss.

    The spans are in order and apart. It also has its length before any cut. It is the first example of its row,
    unless a task makes several of one. Where source and target are encoded apart, *num_tokens* is that of the
    source alone. *remarks* are what its task has to say of the row, such as "question cut"; planning counts the rows
    of each.
    """

    ids: list[int]
    learned: tuple[Span, ...]
    num_tokens: int
    is_long: bool
    is_empty: bool = False
    is_first: bool = True
    num_target_tokens: int = 0  # before any cut, of a target that is encoded apart
    remarks: tuple[str, ...] = ()
    label: str | None = None  # what a classification learns of the row

    @property
    def num_learned(self) -> int:
        """Return how many tokens count in the loss.

        The first token of a row never does, since nothing comes before it. A label counts as one.
        """
        if self.label is not None:
            return 1
        return sum(end - max(begin, 1) for begin, end in self.learned if end > 1)

    @property
    def parts(self) -> Iterator[tuple[bool, list[int]]]:
        """Yield each stretch of ids that is learned, or is not: (whether, ids)."""
        done = 0
        for begin, end in (*self.learned, (len(self.ids), len(self.ids))):
            if done < begin:
                yield False, self.ids[done:begin]
            if begin < end:
                yield True, self.ids[begin:end]
            done = end


def is_kept(spec: DataSpec, row: Encoded) -> bool:
    """Say whether training uses *row*.

    It does where the row is not too long, or cut, and something in it is learned besides its end.
    """
    if row.is_empty:
        return False
    if spec.packing == "blocks":  # its first token is learned from what comes before it
        return True
    return row.num_learned > 0 and not (row.is_long and spec.long_rows in ("refuse", "drop"))


def render_prompt(spec: DataSpec, row: Row, tokenizer: Any) -> str:
    """Return the prompt of *row*.

    It is the template filled in, or the tokenizer's own chat template.

    Raises:
        ValueError: the chat template refuses the row.
    """
    if spec.prompt == CHAT:
        turns = [{"role": "user", "content": str(row[spec.columns.input])}]
        return render(tokenizer, with_context(spec, turns), asks=True)
    plain, with_input = TEMPLATES.get(spec.prompt, (spec.prompt, spec.prompt))
    template = with_input if str(row.get(spec.columns.context) or "").strip() else plain
    return string.Formatter().vformat(template, (), _ByName(spec.columns, row))


class _ByName(dict[str, Any]):
    """The row under the names that a template uses.

    They are our column words, then the file's own.
    """

    def __init__(self, columns: Columns, row: Row) -> None:
        ours = {"input": columns.input, "context": columns.context, "text": columns.text}
        super().__init__({**row, **{word: row[column] for word, column in ours.items() if column in row}})


def encode_prompts(spec: DataSpec, rows: Sequence[Row], tokenizer: Any, limit: int | None) -> list[Encoded]:
    """Return the rows' prompts, fitted as `fit_prompts` does."""
    return fit_prompts(spec, _prompts(spec, rows, tokenizer), tokenizer, limit)


def fit_prompts(spec: DataSpec, found: Sequence[list[int]], tokenizer: Any, limit: int | None) -> list[Encoded]:
    """Return the ids of prompts as prompts.

    Prompts above *limit* tokens, or `data.pad_input_to`, are long. A long prompt is cut where `data.long_rows` names a
    side, before padding and separator, which stay.
    """
    separator = _separator(spec, tokenizer)
    longest = min(spec.pad_input_to or 1 << 40, (limit or 1 << 40) - len(separator))
    return [_prompt(spec, ids, separator, max(1, longest), tokenizer) for ids in found]


def _prompt(spec: DataSpec, ids: list[int], separator: list[int], longest: int, tokenizer: Any) -> Encoded:
    """Pad and separate one prompt.

    Padding is attended to, so that input and response have one distance.
    """
    is_long, num_tokens = len(ids) > longest, len(ids) + len(separator)
    if is_long:
        ids = _cut(spec, ids, longest, tokenizer)
    if spec.pad_input_to is not None:
        ids = ids + [pad_id(tokenizer)] * (spec.pad_input_to - len(ids))
    ids = ids + separator
    return Encoded(ids, (), max(num_tokens, len(ids)), is_long)


def encode_rows(spec: DataSpec, rows: Sequence[Row], tokenizer: Any) -> list[Encoded]:
    """Return *rows* as training sees them.

    Rows above `data.max_tokens` are long, and cut where a side is named.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not spec.prompt:
        texts = [str(row[spec.columns.text]) for row in rows]
        found = _begun(texts, tokenizer)  # as models were trained: many read a text without its begin token poorly
        uncut = [Encoded([*ids, *end], ((0, len(ids) + len(end)),), len(ids) + len(end), False) for ids in found]
    else:
        texts = [str(row[spec.columns.target]) for row in rows]
        targets = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts = encode_prompts(spec, rows, tokenizer, None)
        uncut = [_joined(spec, prompt, [*target, *end]) for prompt, target in zip(prompts, targets, strict=True)]
    return [fit(spec, row, not text.strip(), tokenizer) for row, text in zip(uncut, texts, strict=True)]


def _joined(spec: DataSpec, prompt: Encoded, response: list[int]) -> Encoded:
    ids = [*prompt.ids, *response]
    begin = len(prompt.ids) if spec.loss_on == "response" else 0
    return Encoded(ids, ((begin, len(ids)),), prompt.num_tokens + len(response), prompt.is_long)


def fit(spec: DataSpec, row: Encoded, is_empty: bool, tokenizer: Any) -> Encoded:
    """Return *row*, cut to `data.max_tokens` on the side that the recipe names."""
    ids, learned = row.ids, row.learned
    excess = len(ids) - spec.max_tokens if spec.packing != "blocks" else 0
    if excess > 0 and spec.long_rows in ("cut_left", "cut_right"):
        ids = _cut(spec, ids, spec.max_tokens, tokenizer)
        shift, first = 0, 0
        if spec.long_rows == "cut_left":
            is_masked = not learned or learned[0][0] > 0
            shift, first = excess, int(is_masked and _has_begin(ids, tokenizer))  # the begin token stays masked
        learned = _clipped(learned, shift, first, len(ids))
    return Encoded(ids, learned, row.num_tokens, row.is_long or excess > 0, is_empty)


def _clipped(spans: Sequence[Span], shift: int, first: int, last: int) -> tuple[Span, ...]:
    """Return *spans* moved left by *shift*, within *first* and *last*."""
    moved = ((max(begin - shift, first), min(end - shift, last)) for begin, end in spans)
    return tuple((begin, end) for begin, end in moved if begin < end)


def _cut(spec: DataSpec, ids: list[int], longest: int, tokenizer: Any) -> list[int]:
    """Cut *ids* on the side that the recipe names.

    A begin token stays, since models are trained with it.
    """
    if spec.long_rows == "cut_left":
        begin = ids[: min(longest, _has_begin(ids, tokenizer))]
        return begin + ids[len(ids) - longest + len(begin) :]
    return ids[:longest] if spec.long_rows == "cut_right" else ids


def _has_begin(ids: Sequence[int], tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _prompts(spec: DataSpec, rows: Sequence[Row], tokenizer: Any) -> list[list[int]]:
    texts = []
    for number, row in enumerate(rows, 1):
        try:
            texts.append(render_prompt(spec, row, tokenizer))
        except ValueError as error:
            raise RowFault(number, str(error)) from error
    if not has_turns(spec.prompt):
        return _begun(texts, tokenizer)
    # a chat template writes its own begin token
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def _begun(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the ids of *texts*, behind what the tokenizer begins a text with."""
    found: list[list[int]] = tokenizer(texts)["input_ids"] if texts else []
    if tokenizer.eos_token_id is None:
        return found
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in found]


def _separator(spec: DataSpec, tokenizer: Any) -> list[int]:
    return list(tokenizer([spec.separator], add_special_tokens=False)["input_ids"][0]) if spec.separator else []


def pad_id(tokenizer: Any) -> int:
    """Return the id that fills rows up: the pad token, else the end token."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
