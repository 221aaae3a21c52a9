"""Ranks share the rows that are measured in training; here they are threads, which meet at each exchange."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import sousbatch.recipes
from sousbatch.jobs.tasks import runtime_of
from sousbatch.jobs.training.measuring import AnswerMetric
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import score_with_baseline
from sousbatch.recipes.inspect.tokenizer import load_full
from sousbatch.recipes.schema import Checkpoints, Data, Predict, QuestionAnswering, StageSettings, Train, Zero
from sousbatch.recipes.tasks import task_of

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
CHAT = TINY.parent / "tiny-hangul-chat"
TEXTS = ["가", "나다라 마바사 아자차카 타파하 거너더 러머버", "다", "라", "가나다라마바사아자차카타파하" * 3]


class Rank:
    """One of two ranks."""

    def __init__(self, rank: int, shared: dict[int, Any], barrier: Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, 2, shared, barrier

    def do(self, what: str, work: Callable[[], None]) -> None:
        work()

    def gather(self, value: Any) -> list[Any]:
        self._barrier.wait(timeout=60)
        self._shared[self.rank] = value
        self._barrier.wait(timeout=60)
        return [self._shared[rank] for rank in range(2)]

    def largest(self, value: float) -> float:
        return max(self.gather(value))


class Counting(torch.nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.device, self.count = inner, inner.config, inner.device, 0

    def forward(self, **inputs: Any) -> Any:
        self.count += 1
        return self.inner(**inputs)


def _settings(task: str, metric: str, stage: Any) -> StageSettings:
    return StageSettings(
        task=task,
        data=Data(max_tokens=24),
        train=Train(zero=Zero(stage=stage)),
        checkpoints=Checkpoints(metric=metric),
        predict=Predict(max_new_tokens=3, unit_rows=2, batch_rows=2),
        question_answering=QuestionAnswering(stride_tokens=2, max_question_tokens=4, max_answer_tokens=3),
    )


def _row(text: str) -> dict[str, Any]:
    answers = {"text": [text[0], "가"], "answer_start": [0, 0]}
    return {"input": text, "target": text, "question": "가", "context": text, "answers": answers}


@pytest.mark.parametrize(
    ("task", "metric", "stage", "num_rows"),
    [
        ("question_answering", "korquad_f1", 0, 5),
        ("question_answering", "korquad_f1", 3, 5),  # the weights are sharded: all ranks compute as often
        ("question_answering", "squad_em", 3, 1),  # fewer rows than ranks
        ("causal_lm", "cer", 0, 5),
        ("causal_lm", "sousbatch.predictions.metrics.text:CER", 0, 5),  # as own code is named
    ],
)
def test_two_ranks_measure_what_one_process_would(
    tmp_path: Path, task: str, metric: str, stage: int, num_rows: int
) -> None:
    settings = _settings(task, metric, stage)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(_row(text)) + "\n" for text in TEXTS))
    torch.manual_seed(0)
    model_class = getattr(transformers, task_of(task).model_class)
    model = model_class.from_config(transformers.AutoConfig.from_pretrained(TINY))
    split = SimpleNamespace(path=str(tmp_path / "rows.jsonl"), num_rows=num_rows, name="validation")
    stage_of_all = SimpleNamespace(splits={"predict": split})
    job: Any = SimpleNamespace(
        settings=settings, stage=stage_of_all, used_file=Path, reach_functions=lambda names: None
    )
    shared, barrier = dict[int, Any](), Barrier(2)
    models = [Counting(model) if task == "question_answering" else model for _ in range(2)]

    def measure(rank: int) -> dict[str, float]:
        ranks: Any = Rank(rank, shared, barrier)
        tokenizer = load_full(TINY, (), trusts_code=False)
        return AnswerMetric(job, ranks, tokenizer, lambda: None).measure(models[rank])

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(measure, range(2))
    assert first == second == {f"eval_{metric}": pytest.approx(_alone(settings, model, num_rows))}
    if stage == 3:
        assert models[0].count == models[1].count > 0


def _alone(settings: StageSettings, model: Any, num_rows: int) -> float:
    from sousbatch.jobs.generation.transformers_engine import TransformersEngine

    tokenizer, task = load_full(TINY, (), trusts_code=False), task_of(settings.task)
    loaded = TransformersEngine(settings, model, tokenizer) if task.generates else model
    rows = [_row(text) for text in TEXTS[:num_rows]]
    found = runtime_of(task).answerer(settings, loaded, tokenizer).answer(list(enumerate(rows)))
    predictions = [PredictionRow.from_json(one, position=place) for place, one in enumerate(found)]
    targets = [row["answers" if task.name == "question_answering" else "target"] for row in rows]
    name = settings.checkpoints.metric
    (score,) = score_with_baseline(predictions, targets, [None] * num_rows, metrics=[name])["model"].values()
    return score


class Alone:
    rank, size = 0, 1

    def do(self, what: str, work: Callable[[], None]) -> None:
        work()

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("post", [(), ("cut_chars:1", "replace:rules")])
def test_conversations_are_measured_by_their_answers_and_after_post(tmp_path: Path, post: tuple[str, ...]) -> None:
    """As their predictions are merged and scored."""
    texts = [("가", "나다"), ("나다라 마바사", "가나다라")]
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (tmp_path / "rules").write_text("^.?$\t가나다라")
    settings = _settings("causal_lm", "exact_match", 0)
    settings = replace(
        settings, data=Data(prompt="messages", max_tokens=64), predict=replace(settings.predict, post=post)
    )
    split = SimpleNamespace(path=str(tmp_path / "rows.jsonl"), num_rows=2, name="validation")
    stage = SimpleNamespace(splits={"predict": split})
    job: Any = SimpleNamespace(
        settings=settings, stage=stage, used_file=lambda name: tmp_path / name, reach_functions=lambda names: None
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(CHAT))
    ranks: Any = Alone()
    measured = AnswerMetric(job, ranks, load_full(CHAT, (), trusts_code=False), lambda: None).measure(model)
    assert measured == {"eval_exact_match": 0.5 if post else 0.0}
