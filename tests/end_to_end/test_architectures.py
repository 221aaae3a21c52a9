"""Every architecture of transformers that a task takes: what it learns and answers in batches is what it does alone.

`make test-architectures` runs them all. A small random model of each is trained on two ranks, in micro batches of rows
of several lengths; a model is made of it, and predicts in batches. The evaluation loss and the answers are compared
with plain transformers, row by row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from transformers.models.auto import modeling_auto

Ask = Callable[[dict[str, Any]], dict[str, Any]]

KINDS: dict[str, Mapping[str, str]] = {
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "question_answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
METHODS = {"full": (), "lora": ("adapter.method=lora", "adapter.rank=2", "adapter.alpha=4", "train.learning_rate=0.05")}
CELLS = [(task, kind, method) for task, kinds in KINDS.items() for kind in kinds for method in METHODS]
# What plain transformers (5.23) does not do twice alike, so that nothing is left to compare.
OTHER = dict.fromkeys(("cpmant", "fsmt", "moshi"), "it answers otherwise with its cache than without")
OTHER["youtu"] = "it is not loaded as it was saved"
OTHER["encoder-decoder"] = "its usual config has a decoder that reads later tokens"


def _rows(task: str, count: int) -> list[dict[str, Any]]:
    chance = random.Random(count)

    def numbers(low: int, high: int) -> str:
        return " ".join(str(chance.randrange(28)) for _ in range(chance.randrange(low, high)))

    rows: list[dict[str, Any]] = []
    for place in range(count):
        row = {"input": numbers(2, 14), "target": numbers(1, 8), "question": numbers(1, 5), "context": numbers(4, 30)}
        row["target"] = ("low", "middle", "high")[place % 3] if task == "classification" else row["target"]
        rows.append(row | {"answers": {"text": [row["context"].split()[0]], "answer_start": [0]}})
    return rows


@pytest.mark.architectures
@pytest.mark.parametrize(("task", "kind", "method"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_what_is_learned_and_answered_in_batches_is_what_a_row_alone_gives(
    forked: Ask, task: str, kind: str, method: str
) -> None:
    if kind in OTHER:
        pytest.skip(OTHER[kind])
    rows = {"train": _rows(task, 16), "validation": _rows(task, 9)}
    overrides = ["train.steps=2", "train.micro_batch=2", "train.precision=float32", "consolidate.dtype=float32"]
    overrides += ["predict.max_new_tokens=6", "predict.num_beams=1", *METHODS[method]]
    if task == "question_answering":
        overrides += ["data.max_tokens=24", "question_answering.max_question_tokens=6"]
        overrides += ["question_answering.stride_tokens=4"]
    request = {"do": "compare_with_rows_alone", "task": task, "kind": kind, "rows": rows, "overrides": overrides}
    seen = forked(request)
    for why in ("no small model", "refused"):
        if why in seen:
            pytest.skip(f"{why}: {seen[why]}")
    assert seen["missing"] == []
    same = seen["alone"] if isinstance(seen["alone"][0], str) else pytest.approx(seen["alone"], rel=1e-3, abs=1e-4)
    assert seen["answers"] == same
    if not any("reads the padding" in warning for warning in seen["warnings"]) and task != "question_answering":
        assert seen["eval_loss"] == pytest.approx(seen["loss alone"], rel=2e-4)
