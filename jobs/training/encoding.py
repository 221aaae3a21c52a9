"""The rows of a split as tensors: what training is fed. `recipes.encode` makes rows into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import RunError, UsageError
from ...recipes.data.encode import BATCH_ROWS, Encoded, encode_rows, is_kept
from ...recipes.data.rows import Row, read_rows
from ...recipes.schema import Data as DataSpec

IGNORED_LABEL = -100


class TokenRows(Dataset[dict[str, list[int]]]):
    """The rows of one split as token ids, held as one flat array of 4 B a token."""

    def __init__(self, encoded: Iterable[Encoded]) -> None:
        ids: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        ignored: list[int] = []
        for row in encoded:
            ids.append(np.asarray(row.ids, dtype=np.int32))
            ignored.append(row.num_masked)
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
    """Return the training rows of the data file at *path*, tokenised; rows with nothing to learn are left out.

    Raises:
        RunError: a row has more than `data.max_tokens` tokens and is to be refused, or no
            row has a token that counts in the loss.
    """
    rows = TokenRows(_kept(spec, islice(read_rows(path), limit), tokenizer, str(path)))
    if not len(rows):
        raise RunError(
            f"no row of {path} has a token that counts in the loss; check data.columns and data.max_tokens",
            advice=UsageError.advice,
        )
    return rows


def _kept(spec: DataSpec, rows: Iterable[Row], tokenizer: Any, name: str) -> Iterable[Encoded]:
    iterator, done = iter(rows), 0
    while batch := list(islice(iterator, BATCH_ROWS)):
        for number, row in enumerate(encode_rows(spec, batch, tokenizer), done + 1):
            if row.is_long and spec.long_rows == "refuse":
                raise RunError(
                    f"row {number} of {name} has {row.num_tokens} tokens, its prompt included, and data.max_tokens is "
                    f"{spec.max_tokens}; raise it, or say with data.long_rows what happens to such rows",
                    advice=UsageError.advice,
                )
            if is_kept(spec, row):
                yield row
        done += len(batch)


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
