"""Rows to tokens: prompt, padding, response, and which tokens count in the loss."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import RunError, UsageError
from ...recipes.rows import Row, read_rows
from ...recipes.schema import Columns
from ...recipes.schema import Data as DataSpec

IGNORED_LABEL = -100
_TOKENIZE_ROWS = 1000


def render_prompt(spec: DataSpec, row: Row, tokenizer: Any) -> str:
    """Return the prompt of *row*: the template filled in, or the tokenizer's own chat template."""
    if spec.prompt == "chat":
        messages = [{"role": "system", "content": spec.system}] if spec.system else []
        messages.append({"role": "user", "content": str(row[spec.columns.input])})
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return string.Formatter().vformat(spec.prompt, (), _ByName(spec.columns, row))


class _ByName(dict[str, Any]):
    """The row under the names that a template uses: our column words, then the file's own."""

    def __init__(self, columns: Columns, row: Row) -> None:
        ours = {"input": columns.input, "context": columns.context, "text": columns.text}
        super().__init__({**row, **{word: row[column] for word, column in ours.items() if column in row}})


def prompt_ids(spec: DataSpec, rows: Sequence[Row], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of the rows' prompts, padded and separated as the recipe says.

    Filler goes between the prompt and the separator and is attended to, so that every
    response token has one distance from its input token.

    Raises:
        RunError: a prompt is longer than `data.pad_input_to`.
    """
    adds_specials = spec.prompt != "chat"  # a chat template writes its own
    texts = [render_prompt(spec, row, tokenizer) for row in rows]
    found: list[list[int]] = tokenizer(texts, add_special_tokens=adds_specials)["input_ids"]
    if found and adds_specials and tokenizer.eos_token_id is not None:
        found = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in found]
    if spec.pad_input_to is not None:
        for text, ids in zip(texts, found, strict=True):
            if len(ids) > spec.pad_input_to:
                raise RunError(
                    f"a prompt has {len(ids)} tokens and data.pad_input_to is {spec.pad_input_to}: {text[:60]!r}",
                    advice=UsageError.advice,
                )
            ids += [pad_id(tokenizer)] * (spec.pad_input_to - len(ids))
    separator = tokenizer(spec.separator, add_special_tokens=False)["input_ids"] if spec.separator else []
    return [ids + separator for ids in found]


def pad_id(tokenizer: Any) -> int:
    """Return the id that fills rows up: the pad token, else the end token."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


@dataclass(frozen=True)
class _Encoded:
    """One row: token ids, and how many of them, from the first, do not count in the loss."""

    ids: list[int]
    num_ignored: int


class TokenRows(Dataset[dict[str, list[int]]]):
    """The rows of one split as token ids, held as one flat array of 4 B a token."""

    def __init__(self, encoded: Iterable[_Encoded]) -> None:
        ids: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        ignored: list[int] = []
        for row in encoded:
            ids.append(np.asarray(row.ids, dtype=np.int32))
            ignored.append(row.num_ignored)
        self._flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self._ends = np.cumsum([len(row) for row in ids])
        self._ignored = ignored

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start = int(self._ends[index - 1]) if index else 0
        ids = self._flat[start : self._ends[index]].tolist()
        labels = [IGNORED_LABEL] * self._ignored[index] + ids[self._ignored[index] :]
        return {"input_ids": ids, "labels": labels}


def load_rows(spec: DataSpec, path: Path, tokenizer: Any, *, limit: int | None = None) -> TokenRows:
    """Return the training rows of the data file at *path*, tokenised.

    Raises:
        RunError: a row has more than `data.max_tokens` tokens and is not to be cut, or no
            row has a token that counts in the loss.
    """
    rows = TokenRows(_encode(spec, islice(read_rows(path), limit), tokenizer, str(path)))
    return rows


def _encode(spec: DataSpec, rows: Iterable[Row], tokenizer: Any, name: str) -> Iterable[_Encoded]:
    iterator, first, counted = iter(rows), 0, 0
    while batch := list(islice(iterator, _TOKENIZE_ROWS)):
        for number, one in enumerate(_encode_batch(spec, batch, tokenizer), first + 1):
            if len(one.ids) > spec.max_tokens and not spec.keep_long:
                raise RunError(
                    f"row {number} of {name} has {len(one.ids)} tokens and data.max_tokens is {spec.max_tokens}; "
                    "raise it, or set data.keep_long=true to cut such rows",
                    advice=UsageError.advice,
                )
            cut = _Encoded(one.ids[: spec.max_tokens], one.num_ignored)
            counted += max(0, len(cut.ids) - cut.num_ignored)
            yield cut
        first += len(batch)
    if first and not counted:
        raise RunError(
            f"no row of {name} has a token that counts in the loss; check data.columns and data.max_tokens",
            advice=UsageError.advice,
        )


def _encode_batch(spec: DataSpec, rows: Sequence[Row], tokenizer: Any) -> list[_Encoded]:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not spec.prompt:
        texts = [str(row[spec.columns.text]) for row in rows]
        return [_Encoded([*ids, *end], 0) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    targets = tokenizer([str(row[spec.columns.target]) for row in rows], add_special_tokens=False)["input_ids"]
    return [
        _Encoded([*prompt, *target, *end], len(prompt) if spec.loss_on == "response" else 0)
        for prompt, target in zip(prompt_ids(spec, rows, tokenizer), targets, strict=True)
    ]


class Collator:
    """Pads a batch on the right; filler tokens are neither attended to nor counted."""

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors input_ids, attention_mask and labels of shape (rows, longest)."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        mask = (torch.arange(longest)[None, :] < lengths).long()
        return {
            "input_ids": padded("input_ids", self._pad),
            "attention_mask": mask,
            "labels": padded("labels", IGNORED_LABEL),
        }
