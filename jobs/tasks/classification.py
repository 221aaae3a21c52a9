"""Classification in the jobs.

Texts with their labels become tensors for training; a prediction is the likeliest label, with the probability of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ...errors import RunError, UsageError
from ...predictions.rows import PREDICTION
from ...recipes.data.encode import Encoded, pad_id
from ...recipes.data.rows import Row, read_rows
from ...recipes.labels import labels_in
from ...recipes.model_kinds import padding_side, reads_padding
from ...recipes.schema import StageSettings
from ...recipes.tasks.classification import PROBABILITIES, TASK
from ..generation import not_finite
from ..generation.batches import Batches
from ..generation.transformers_engine import input_device
from . import IGNORED_LABEL, TaskRuntime
from .causal_lm import Ragged, kept_rows

_DIGITS = 6  # of a probability; float32 has no more


class LabelledTexts(Dataset[dict[str, Any]]):
    """The texts of one split as token ids, and the places of their labels."""

    def __init__(self, encoded: Iterable[Encoded], label2id: Mapping[str, int]) -> None:
        self._ids, self.labels = Ragged(), list[int]()
        for row in encoded:
            self._ids.append(row.ids)
            self.labels.append(label2id[str(row.label)])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index], "labels": self.labels[index]}


def _load_texts(settings: StageSettings, path: Path, tokenizer: Any, limit: int | None = None) -> LabelledTexts:
    label2id = {label: place for place, label in enumerate(labels_in(settings.model.config))}
    texts = LabelledTexts(
        kept_rows(settings, islice(read_rows(path), limit), tokenizer, str(path)),
        label2id,
    )
    if not len(texts):
        raise RunError(f"no row of {path} is short enough; raise data.max_tokens", advice=UsageError.advice)
    return texts


class TextCollator:
    """Pads texts on the *side* that the model wants. Padding is not attended to."""

    def __init__(self, pad: int, side: str = "right") -> None:
        self._pad, self._side = pad, side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors.

        They are input_ids and attention_mask of shape (rows, longest), and labels of shape (rows,).
        """
        return text_batch([row["input_ids"] for row in rows], self._pad, self._side) | {
            "labels": torch.tensor([row["labels"] for row in rows])
        }


def text_batch(ids: Sequence[list[int]], pad: int, side: str) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask of shape (texts, longest)."""

    def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    tensors = [torch.tensor(one) for one in ids]
    return {
        "input_ids": padded(tensors, pad),
        "attention_mask": padded([torch.ones_like(one) for one in tensors], 0),
    }


class _LabelLoss:
    """The mean cross-entropy of labels, each with its weight.

    The models' own loss knows neither weights nor a step of several batches (see `seq2seq.token_loss`).
    """

    def __init__(self, weights: Sequence[float] | None) -> None:
        self._weights = weights

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        weights = None if self._weights is None else torch.tensor(self._weights, device=logits.device)
        summed = cross_entropy(logits, labels, weight=weights, reduction="sum")
        return summed / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED_LABEL).sum())


def _label_loss(settings: StageSettings, examples: Any) -> _LabelLoss:
    labels, given = labels_in(settings.model.config), settings.train.class_weights
    if given == "balanced":
        return _LabelLoss(balanced_weights(examples.labels, len(labels)))
    return _LabelLoss([float(given.get(label, 1.0)) for label in labels] if given else None)


def balanced_weights(labels: Sequence[int], num_labels: int) -> list[float]:
    """Return a weight for each label, so that all count alike.

    It is rows / (labels x rows of it), as scikit-learn's `class_weight="balanced"`. A label whose rows were all left
    out has weight 1.
    """
    counts = Counter(labels)
    return [len(labels) / (num_labels * counts[place]) if counts[place] else 1.0 for place in range(num_labels)]


class LabelAnswerer:
    """Predicts the label of each row, with the probabilities of all.

    The probabilities stand in the order of the model's `id2label`.
    """

    def __init__(self, settings: StageSettings, model: Any, tokenizer: Any) -> None:
        self._settings, self._model, self._tokenizer, self._pad = settings, model, tokenizer, pad_id(tokenizer)
        is_alone = reads_padding(model.config.to_dict(), settings.data.max_tokens)
        batch_rows = 1 if is_alone else settings.predict.batch_rows
        self._batches = Batches(batch_rows, settings.predict.batch_tokens)
        config = model.config.to_dict()
        self._side = padding_side(config)
        self._labels, self._longest = labels_in(config), TASK.longest(settings, "predict", config)
        if model.config.pad_token_id is None:  # a decoder finds the end of a text by it
            model.config.pad_token_id = self._pad

    def answer(self, rows: Sequence[tuple[int, Row]]) -> list[dict[str, Any]]:
        """Return the predictions of rows, in their order.

        The rows come as (position in the file, row) pairs.

        Raises:
            RunError: the model's scores of a row are no numbers.
        """
        found = TASK.encode(self._settings, "predict", [row for _, row in rows], self._tokenizer, self._longest)
        ids = [one.ids for one in found]
        sizes = [(0, len(one)) for one in ids]
        positions = [position for position, _ in rows]
        probabilities = self._batches.run(
            sizes, lambda places: self._softmax([ids[place] for place in places]), positions
        )
        for (position, _), values in zip(rows, probabilities, strict=True):
            if not all(map(math.isfinite, values)):
                raise not_finite(position, "of the labels")
        best = [max(range(len(values)), key=values.__getitem__) for values in probabilities]
        return [
            {PREDICTION: self._labels[label], PROBABILITIES: values}
            for label, values in zip(best, probabilities, strict=True)
        ]

    @torch.inference_mode()
    def _softmax(self, ids: list[list[int]]) -> list[list[float]]:
        batch = text_batch(ids, self._pad, self._side)
        batch = {name: value.to(input_device(self._model)) for name, value in batch.items()}
        logits = self._model(**batch).logits.float()
        return [[round(value, _DIGITS) for value in row] for row in logits.softmax(-1).tolist()]


RUNTIME = TaskRuntime(
    examples=_load_texts,
    collator=lambda settings, tokenizer, model: TextCollator(pad_id(tokenizer), padding_side(model.config.to_dict())),
    answerer=LabelAnswerer,
    loss=_label_loss,
)
