"""Causal language modelling in the jobs.

Rows become tensors for training; prompts are continued for predictions.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ...errors import RunError, UsageError
from ...recipes.data.encode import BATCH_ROWS, Encoded, is_kept, pad_id
from ...recipes.data.rows import Row, read_rows
from ...recipes.schema import StageSettings
from ...recipes.tasks import task_of
from . import IGNORED_LABEL, Examples, TaskRuntime
from .generating import GeneratingAnswerer
from .packed import Blocks, Packs, pack_batch


class TokenRows(Dataset[dict[str, list[int]]]):
    """The rows of one split as token ids.

    They are held as flat arrays: 4 B a token, and some bytes a row.
    """

    def __init__(self, encoded: Iterable[Encoded]) -> None:
        self._ids, self._spans = Ragged(), Ragged()
        for row in encoded:
            self._ids.append(row.ids)
            self._spans.append(chain.from_iterable(row.learned))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def flat(self) -> array[int]:
        """The ids of all rows, one after another."""
        return self._ids.flat

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return self._ids.lengths

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, bounds = self._ids[index], self._spans[index]
        labels = [IGNORED_LABEL] * len(ids)
        for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
            labels[begin:end] = ids[begin:end]
        return {"input_ids": ids, "labels": labels}


class Ragged:
    """Lists of whole numbers below 2**31, one after another in memory."""

    def __init__(self) -> None:
        self.flat, self._ends = array("i"), array("q")

    def append(self, numbers: Iterable[int]) -> None:
        """Add one list."""
        self.flat.extend(numbers)
        self._ends.append(len(self.flat))

    @property
    def lengths(self) -> list[int]:
        """The lengths of the lists."""
        return [end - start for start, end in pairwise(chain([0], self._ends))]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[int]:
        start = self._ends[index - 1] if index else 0
        return self.flat[start : self._ends[index]].tolist()


def load_examples(settings: StageSettings, path: Path, tokenizer: Any, limit: int | None = None) -> Examples:
    """Return the examples of the data file at *path*: rows, packs or blocks."""
    rows = load_rows(settings, path, tokenizer, limit)
    shared: dict[str, Callable[[TokenRows, int], Examples]] = {"rows": Packs, "blocks": Blocks}
    packing, size = settings.data.packing, settings.data.max_tokens
    return rows if packing == "none" else shared[packing](rows, size)


def load_rows(settings: StageSettings, path: Path, tokenizer: Any, limit: int | None = None) -> TokenRows:
    """Return the rows of the data file at *path*.

    Rows with nothing to learn are left out.

    Raises:
        RunError: a row has more than `data.max_tokens` tokens and is to be refused, or no
            row has a token that counts in the loss.
    """
    rows = TokenRows(kept_rows(settings, islice(read_rows(path), limit), tokenizer, str(path)))
    if not len(rows):
        raise RunError(
            f"no row of {path} has a token that counts in the loss; check data.columns and data.max_tokens",
            advice=UsageError.advice,
        )
    return rows


def kept_rows(settings: StageSettings, rows: Iterable[Row], tokenizer: Any, name: str) -> Iterator[Encoded]:
    """Yield the examples that training uses of *rows*, which messages call *name*."""
    data, iterator, done, task = settings.data, iter(rows), 0, task_of(settings.task)
    while batch := list(islice(iterator, BATCH_ROWS)):
        for number, row in enumerate(task.encode(settings, "train", batch, tokenizer, data.max_tokens), done + 1):
            if row.is_long and data.long_rows == "refuse":
                raise RunError(
                    f"row {number} of {name} has {row.num_tokens} tokens, its prompt included, and data.max_tokens is "
                    f"{data.max_tokens}; raise it, or say with data.long_rows what happens to such rows",
                    advice=UsageError.advice,
                )
            if is_kept(data, row):
                yield row
        done += len(batch)


class Collator:
    """Pads a batch on the right.

    Padding is neither attended to nor counted in the loss. With *is_flat* packs of rows are joined instead.
    """

    def __init__(self, pad: int, *, is_flat: bool = False) -> None:
        self._pad, self._is_flat = pad, is_flat

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors of shape (rows, longest).

        They are input_ids, attention_mask and labels; of packs, position_ids in place of the mask.
        """
        if "position_ids" in rows[0]:
            return pack_batch(rows, self._pad, is_flat=self._is_flat)
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, padding: int) -> torch.Tensor:
            return torch.tensor([row[name] + [padding] * (longest - len(row[name])) for row in rows])

        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        mask = (torch.arange(longest)[None, :] < lengths).long()
        return {
            "input_ids": padded("input_ids", self._pad),
            "attention_mask": mask,
            "labels": padded("labels", IGNORED_LABEL),
        }


RUNTIME = TaskRuntime(
    examples=load_examples,
    collator=lambda settings, tokenizer, model: Collator(
        pad_id(tokenizer), is_flat=settings.model.attention == "flash_attention_2"
    ),
    answerer=GeneratingAnswerer,
)
