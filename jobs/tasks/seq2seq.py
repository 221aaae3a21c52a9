"""Sequence to sequence in the jobs.

Sources and targets become tensors for training; the decoder writes the predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ...recipes.data.encode import pad_id
from ...recipes.schema import StageSettings
from . import IGNORED_LABEL, TaskRuntime
from .causal_lm import TokenRows, load_rows
from .generating import GeneratingAnswerer


class PairRows(Dataset[dict[str, list[int]]]):
    """The sources and targets of one split.

    *rows* hold each pair as one sequence, of which the target is learned.
    """

    def __init__(self, rows: TokenRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self._rows[index]
        num_source = row["labels"].count(IGNORED_LABEL)
        return {"input_ids": row["input_ids"][:num_source], "labels": row["labels"][num_source:]}


def _load_pairs(settings: StageSettings, path: Path, tokenizer: Any, limit: int | None = None) -> PairRows:
    return PairRows(load_rows(settings, path, tokenizer, limit))


class PairCollator:
    """Pads sources and targets on the right.

    Padding is neither attended to nor counted in the loss. The decoder reads the targets as *model* itself shifts them.
    """

    def __init__(self, pad: int, model: Any) -> None:
        self._pad, self._config = pad, model.config
        self._shift = getattr(model, "prepare_decoder_input_ids_from_labels", self._shifted)

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors of shape (rows, longest).

        Of the sources they are input_ids and attention_mask, of the targets labels and decoder_input_ids.
        """
        sources = [torch.tensor(row["input_ids"]) for row in rows]
        targets = [torch.tensor(row["labels"]) for row in rows]
        labels = _padded(targets, IGNORED_LABEL)
        batch = {
            "input_ids": _padded(sources, self._pad),
            "attention_mask": _padded([torch.ones_like(source) for source in sources], 0),
            "labels": labels,
        }
        return batch | {"decoder_input_ids": self._shift(labels=labels.clone())}  # FSMT writes into what it shifts

    def _shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """Return *labels* shifted, as models do that have no method for it."""
        start = self._config.decoder_start_token_id
        shifted = labels.new_full(labels.shape, self._pad if start is None else start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == IGNORED_LABEL, self._pad)


def _padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the mean cross-entropy of the tokens that count.

    *outputs* have logits of shape (rows, tokens, words), *labels* have shape (rows, tokens). Of a step that is summed
    up over several batches, *num_items_in_batch* is the number of all its tokens. The models' own loss knows nothing
    of it, while transformers' Trainer believes it does (5.23, `model_accepts_loss_kwargs`).
    """
    summed = cross_entropy(outputs["logits"].float().flatten(0, -2), labels.flatten(), reduction="sum")
    return summed / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED_LABEL).sum())


RUNTIME = TaskRuntime(
    examples=_load_pairs,
    collator=lambda settings, tokenizer, model: PairCollator(pad_id(tokenizer), model),
    answerer=GeneratingAnswerer,
    loss=lambda settings, examples: token_loss,
)
