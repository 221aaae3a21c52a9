"""The runtime half of `windows_task`: learns windows, and answers a row with the number of its windows."""

from __future__ import annotations

from itertools import islice

import torch
import windows_task

from sousbatch.jobs.tasks import TaskRuntime
from sousbatch.recipes.data.rows import read_rows

TASK = windows_task.TASK


def _examples(settings, path, tokenizer, limit):
    windows = TASK.encode(settings, "train", list(islice(read_rows(path), limit)), tokenizer, settings.data.max_tokens)
    return [{"input_ids": one.ids, "labels": one.ids} for one in windows]


def _collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in padding.items()
    }


class _Answerer:
    def __init__(self, settings, model, tokenizer):
        self._settings, self._model, self._tokenizer = settings, model, tokenizer

    def answer(self, rows):
        found = []
        for _, row in rows:
            windows = TASK.encode(self._settings, "predict", [row], self._tokenizer, self._settings.data.max_tokens)
            logits = self._model(torch.tensor([windows[-1].ids])).logits
            word = self._tokenizer.decode([int(logits[0, -1].argmax())])
            found.append({"prediction": word, "num_windows": len(windows)})
        return found


RUNTIME = TaskRuntime(examples=_examples, collator=lambda settings, tokenizer, model: _collate, answerer=_Answerer)
