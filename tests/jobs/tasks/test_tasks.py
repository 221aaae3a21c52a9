"""The runtime half of every task passes the same contract, that of another package too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import TaskType

import sousbatch.recipes
from sousbatch.jobs.tasks import TaskRuntime, load_model, runtime_of
from sousbatch.jobs.training.model import load_tokenizer
from sousbatch.recipes.schema import Data, Model, Predict, StageSettings
from sousbatch.recipes.tasks import TASKS, TaskSpec, task_of

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
TEXTS = ["가", "나다라 마바", "사아자차카 타"]
# Settings that fit each task, and one row of its data for a text.
CASES: dict[str, tuple[Data, Any]] = {
    "seq2seq": (Data(max_tokens=32, max_target_tokens=32), lambda text: {"input": text, "target": text}),
    "classification": (Data(max_tokens=64), lambda text: {"input": text, "target": len(text) > 1}),
    "causal_lm": (Data(max_tokens=64), lambda text: {"input": text, "target": text}),
    "question_answering": (
        Data(max_tokens=256),
        lambda text: {"question": "가?", "context": text, "answers": {"text": [text[0]], "answer_start": [0]}},
    ),
    "windows": (Data(prompt="", max_tokens=4), lambda text: {"text": [text, text]}),
}

LABELS = {"id2label": {0: "false", 1: "true"}, "label2id": {"false": 0, "true": 1}}

# Configs of models for tasks that the tiny decoder does not fit, with the ids of its tokenizer.
_SIZES = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
_HEADS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_IDS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Any] = {
    "seq2seq": transformers.BartConfig(**_SIZES, **_HEADS, **_IDS, decoder_start_token_id=2, forced_eos_token_id=2),
    "classification": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **_IDS, **LABELS),
}


@dataclass
class Case:
    """A task with settings, rows and a model."""

    task: TaskSpec
    runtime: TaskRuntime
    settings: StageSettings
    rows: list[Any]
    data_path: Path
    model_dir: Path


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a random model of each class that was asked for."""
    return {}


@pytest.fixture(params=[*TASKS, "windows"])
def case(
    request: pytest.FixtureRequest,
    windows: None,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    model_dirs: dict[str, Path],
) -> Case:
    task, (data, row) = task_of(request.param), CASES[request.param]
    if task.model_class not in model_dirs:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model")
        config = CONFIGS.get(task.name, transformers.AutoConfig.from_pretrained(TINY))
        getattr(transformers, task.model_class).from_config(config).save_pretrained(folder)
        model_dirs[task.model_class] = folder
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(text), ensure_ascii=False) + "\n" for text in TEXTS))
    return Case(
        task=task,
        runtime=runtime_of(task),
        settings=StageSettings(
            task=task.name,
            model=Model(config=LABELS if task.has_labels else {}),
            data=data,
            predict=Predict(max_new_tokens=4),
        ),
        rows=list(enumerate(map(row, TEXTS))),
        data_path=path,
        model_dir=model_dirs[task.model_class],
    )


def test_its_examples_are_those_that_planning_counts(case: Case) -> None:
    tokenizer, longest = load_tokenizer(case.settings, TINY), case.settings.data.max_tokens
    counted = case.task.encode(case.settings, "train", [row for _, row in case.rows], tokenizer, longest)
    assert len(case.runtime.examples(case.settings, case.data_path, tokenizer, None)) == len(counted)
    assert sum(one.is_first for one in counted) == len(TEXTS)
    first = case.task.encode(case.settings, "train", [case.rows[0][1]], tokenizer, longest)
    assert len(case.runtime.examples(case.settings, case.data_path, tokenizer, 1)) == len(first)


def test_its_batches_have_a_loss_in_its_model(case: Case) -> None:
    tokenizer = load_tokenizer(case.settings, TINY)
    examples = case.runtime.examples(case.settings, case.data_path, tokenizer, None)
    model = getattr(transformers, case.task.model_class).from_pretrained(case.model_dir)
    batch = case.runtime.collator(case.settings, tokenizer, model)([examples[0], examples[1]])
    if case.runtime.loss is None:
        assert torch.isfinite(model(**batch).loss)
    else:
        labels = batch.pop("labels")
        assert torch.isfinite(case.runtime.loss(case.settings, examples)(model(**batch), labels))
    assert TaskType[case.task.peft_type]


def test_a_row_gets_the_same_prediction_whatever_is_asked_with_it(case: Case) -> None:
    answerer = load_model(case.settings, case.model_dir, TINY, "cpu", "float32").answerer(case.settings)
    together = answerer.answer(case.rows)
    assert [answerer.answer([row])[0] for row in reversed(case.rows)] == together[::-1]
    assert all(answer.keys() == {"prediction", *case.task.fields} for answer in together)
    assert json.loads(json.dumps(together)) == together
