"""Examples that several rows share: packs of rows, and blocks of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ...recipes.data.packing import num_blocks, packs_of
from . import IGNORED_LABEL

if TYPE_CHECKING:
    from .causal_lm import TokenRows


class Packs:
    """Rows side by side in examples of at most *size* tokens.

    Positions begin anew at each row, by which transformers keeps the rows of an example apart: without a mask for
    padding it attends within runs of rising positions alone (`masking_utils.find_packed_sequence_indices`).
    """

    def __init__(self, rows: TokenRows, size: int) -> None:
        self._rows, self._packs = rows, list(packs_of(rows.lengths, size))

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in self._packs[index]:
            example = self._rows[row]
            found["input_ids"] += example["input_ids"]
            found["labels"] += [IGNORED_LABEL, *example["labels"][1:]]  # the row before does not foretell its first
            found["position_ids"] += range(len(example["input_ids"]))
        return found


class Blocks:
    """All rows one after another, cut every *size* tokens; the last one is shorter."""

    def __init__(self, rows: TokenRows, size: int) -> None:
        self._ids, self._size = rows.flat, size

    def __len__(self) -> int:
        return num_blocks(len(self._ids), self._size)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self._ids[index * self._size : (index + 1) * self._size].tolist()
        return {"input_ids": ids, "labels": ids}


def pack_batch(packs: Sequence[Mapping[str, list[int]]], pad: int, *, is_flat: bool) -> dict[str, torch.Tensor]:
    """Return a batch of packs: int64 tensors of shape (packs, longest).

    They are input_ids, labels and position_ids. Padding is a row of its own, which counts in no loss. With *is_flat*
    all packs lie in one row of shape (1, all tokens): flash attention tells the rows of no other batch apart.
    """
    names = ("input_ids", "labels", "position_ids")
    if is_flat:
        return {name: torch.tensor([[value for pack in packs for value in pack[name]]]) for name in names}
    longest = max(len(pack["input_ids"]) for pack in packs)
    padding = {"input_ids": pad, "labels": IGNORED_LABEL}

    def padded(name: str, values: list[int]) -> list[int]:
        missing = longest - len(values)
        return values + (list(range(missing)) if name == "position_ids" else [padding[name]] * missing)

    return {name: torch.tensor([padded(name, pack[name]) for pack in packs]) for name in names}
