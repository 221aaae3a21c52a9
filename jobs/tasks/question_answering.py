"""Extractive question answering in the jobs.

Windows become tensors for training; the best span over the windows of a row is its answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ...predictions.rows import PREDICTION
from ...recipes.data.encode import BATCH_ROWS, pad_id
from ...recipes.data.rows import Row, read_rows
from ...recipes.model_kinds import reads_padding
from ...recipes.schema import StageSettings
from ...recipes.tasks.question_answering import TASK, Window
from ..generation import not_finite
from ..generation.batches import Batches
from ..generation.transformers_engine import input_device
from . import IGNORED_LABEL, TaskRuntime

_DIGITS = 4  # of scores: rows are computed in batches, and the rest is noise


class WindowRows(Dataset[dict[str, Any]]):
    """The windows of one split, held as flat arrays of 5 B a token."""

    def __init__(self, windows: Iterator[Window]) -> None:
        ids: list[NDArray[np.int32]] = []
        types: list[NDArray[np.int8]] = []
        self._spans: list[tuple[int, int]] = []
        for window in windows:
            ids.append(np.asarray(window.ids, np.int32))
            types.append(np.asarray(window.type_ids, np.int8))
            self._spans.append((window.start, window.end))
        self._ends = np.cumsum([len(one) for one in ids])
        self._ids = np.concatenate(ids)
        self._types = np.concatenate(types)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        ids = self._ids[place].tolist()
        return {
            "input_ids": ids,
            "token_type_ids": self._types[place].tolist(),
            "labels": [*self._spans[index], len(ids)],
        }


def _windows(settings: StageSettings, use: Any, rows: Iterator[Row], tokenizer: Any) -> Iterator[Window]:
    while batch := list(islice(rows, BATCH_ROWS)):
        for window in TASK.encode(settings, use, batch, tokenizer, settings.data.max_tokens):
            assert isinstance(window, Window)
            yield window


def load_examples(settings: StageSettings, path: Path, tokenizer: Any, limit: int | None = None) -> WindowRows:
    """Return the windows of the first *limit* rows of the data file at *path*."""
    return WindowRows(_windows(settings, "train", islice(read_rows(path), limit), tokenizer))


class Collator:
    """Pads a batch on the right; token types are left out where the model has none."""

    def __init__(self, pad: int, *, has_types: bool) -> None:
        self._pad, self._has_types = pad, has_types

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors of shape (rows, longest).

        Labels are of shape (rows, 3), where they are given: the first and the last token of the answer, and how many
        tokens the window has.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)

        def padded(name: str, padding: int) -> torch.Tensor:
            return torch.tensor([[*row[name]] + [padding] * (longest - len(row[name])) for row in rows])

        batch = {
            "input_ids": padded("input_ids", self._pad),
            "attention_mask": (torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]).long(),
        }
        if self._has_types:
            batch["token_type_ids"] = padded("token_type_ids", 0)
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def make_collator(settings: StageSettings, tokenizer: Any, model: Any) -> Collator:
    """Return the collator of the windows that *model* reads."""
    return Collator(pad_id(tokenizer), has_types=(getattr(model.config, "type_vocab_size", None) or 0) > 1)


def span_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return the mean loss of windows: half the cross-entropies of both ends.

    *labels* are as `Collator` writes them; three of a window count in *num_items_in_batch*. The models' own loss lets
    padding share in the probabilities, so that it depends on the batch.
    """
    logits = torch.stack((outputs["start_logits"], outputs["end_logits"]), -1).float()  # (rows, tokens, 2)
    places, lengths = labels[:, :2], labels[:, 2].where(labels[:, 2] > 0, logits.shape[1])
    is_padding = torch.arange(logits.shape[1], device=logits.device) >= lengths[:, None]
    logits = logits.masked_fill(is_padding[..., None], -torch.inf)
    # a place behind the window counts nothing, as in the models' own loss
    summed = cross_entropy(logits, places.where(places < lengths[:, None], IGNORED_LABEL), reduction="sum") / 2
    return summed * 3 / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED_LABEL).sum())


class SpanAnswerer:
    """Answers with the best span over the windows of a row, and keeps the next best."""

    def __init__(self, settings: StageSettings, model: Any, tokenizer: Any) -> None:
        self._settings, self._model, self._tokenizer = settings, model, tokenizer
        self._collate = make_collator(settings, tokenizer, model)
        is_alone = reads_padding(model.config.to_dict(), settings.data.max_tokens)
        batch_rows = 1 if is_alone else settings.predict.batch_rows
        self._batches = Batches(batch_rows, settings.predict.batch_tokens)

    def answer(self, rows: Sequence[tuple[int, Row]]) -> list[dict[str, Any]]:
        """Return the predictions of rows, in their order.

        Texts are those of the passages, letter for letter. The rows come as (position in the file, row) pairs.

        Raises:
            RunError: the model's scores of a row are no numbers.
        """
        windows = list(_windows(self._settings, "predict", (row for _, row in rows), self._tokenizer))
        number = -1
        owners = [number := number + window.is_first for window in windows]
        logits = self._logits(windows, [rows[owner][0] for owner in owners])
        answers = []
        for owner, places in groupby(range(len(windows)), owners.__getitem__):
            (position, row), own = rows[owner], [(windows[place], logits[place]) for place in places]
            if any(np.isnan(scores).any() or np.isposinf(scores).any() for _, scores in own):
                raise not_finite(position, "of the places in its passage")
            answers.append(self._choose(str(row[self._settings.data.columns.context]), own))
        return answers

    def _logits(self, windows: Sequence[Window], positions: Sequence[int]) -> list[NDArray[np.float32]]:
        """Return an array of shape (2, tokens) for each window.

        The *positions* are those of their rows.
        """
        sizes = [(0, len(one.ids)) for one in windows]
        return self._batches.run(sizes, lambda places: self._forward([windows[place] for place in places]), positions)

    @torch.no_grad()
    def _forward(self, windows: list[Window]) -> list[NDArray[np.float32]]:
        """Compute one batch."""
        batch = self._collate([{"input_ids": one.ids, "token_type_ids": one.type_ids} for one in windows])
        output = self._model(**{name: tensor.to(input_device(self._model)) for name, tensor in batch.items()})
        both = torch.stack([output.start_logits, output.end_logits], dim=1).float().cpu().numpy()
        return [values[:, : len(one.ids)] for values, one in zip(both, windows, strict=True)]

    def _choose(self, passage: str, windows: Sequence[tuple[Window, NDArray[np.float32]]]) -> dict[str, Any]:
        spec = self._settings.question_answering
        scores: dict[tuple[int, int], float] = {}
        for window, logits in windows:
            for place, score in best_spans(window, logits, spec.max_answer_tokens, spec.n_best):
                scores[place] = max(score, scores.get(place, score))
        # run_squad takes the smallest: of a window without the answer CLS says nothing on the others
        null_score = min(float(logits[:, window.start].sum()) for window, logits in windows)
        ranked = sorted(scores.items(), key=lambda one: (-one[1], one[0]))[: spec.n_best]
        n_best = [_span(passage, start, end, score) for (start, end), score in ranked]
        is_null = not n_best or (spec.null_threshold is not None and null_score - ranked[0][1] > spec.null_threshold)
        best = {"text": "", "score": round(null_score, _DIGITS), "start": None} if is_null else n_best[0]
        return {
            PREDICTION: best["text"],
            "start": best["start"],
            "score": best["score"],
            "null_score": round(null_score, _DIGITS),
            "n_best": n_best,
        }


def best_spans(
    window: Window, logits: NDArray[np.float32], max_tokens: int, count: int
) -> list[tuple[tuple[int, int], float]]:
    """Return the *count* best spans of at most *max_tokens* tokens.

    Each is ((start, end) in characters, score), and none comes twice: several tokens may be of one character.
    The score is that of BERT (Devlin et al. 2019): the start logit of the first token plus the end logit of the last.
    All spans within the passage are compared.
    """
    inside = [number for number, place in enumerate(window.offsets) if place is not None]
    if not inside:
        return []
    starts, ends = logits[0, inside], np.full(len(inside) + max_tokens - 1, -np.inf, np.float32)
    ends[: len(inside)] = logits[1, inside]
    table = starts[:, None] + np.lib.stride_tricks.sliding_window_view(ends, max_tokens)
    order = np.argsort(-table, axis=None, kind="stable")
    found: dict[tuple[int, int], float] = {}
    for first, width in zip(*np.unravel_index(order, table.shape), strict=True):
        score = float(table[first, width])
        if score == -np.inf or len(found) == count:
            break
        begin, end = window.offsets[inside[first]], window.offsets[inside[first + width]]
        assert begin is not None and end is not None
        found.setdefault((begin[0], end[1]), score)
    return [*found.items()]


def _span(passage: str, start: int, end: int, score: float) -> dict[str, Any]:
    """Return a span as it is written, without the blanks that some tokenizers count."""
    text = passage[start:end]
    start += len(text) - len(text.lstrip())
    return {"text": text.strip(), "score": round(score, _DIGITS), "start": start}


RUNTIME = TaskRuntime(
    examples=load_examples,
    collator=make_collator,
    answerer=SpanAnswerer,
    loss=lambda settings, examples: span_loss,
)
