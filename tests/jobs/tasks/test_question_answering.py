"""The best span over all windows of a row answers it; checked against a plain search over a real model's logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sousbatch.errors import RunError
from sousbatch.jobs.tasks.question_answering import RUNTIME, Collator, best_spans, span_loss
from sousbatch.recipes.building import prepare_model
from sousbatch.recipes.schema import Adapter, Data, Predict, QuestionAnswering, StageSettings, Train
from sousbatch.recipes.tasks.question_answering import TASK, Window

WORDS = "가나 다라 마바 사아 자차 카타 파하 거너 더러 머버".split()
SETTINGS = StageSettings(
    task="question_answering",
    data=Data(max_tokens=9),
    predict=Predict(batch_rows=3),
    question_answering=QuestionAnswering(stride_tokens=2, max_question_tokens=2, max_answer_tokens=3, n_best=4),
)
ROWS = [
    {"question": "가나 다라", "context": "  ".join(WORDS)},
    {"question": "다라", "context": "더러"},
    {"question": "", "context": " ".join(reversed(WORDS))},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: number for number, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=14, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return transformers.BertForQuestionAnswering(config).eval()


def answers(tokenizer: Any, model: Any, settings: StageSettings = SETTINGS) -> list[dict[str, Any]]:
    return RUNTIME.answerer(settings, model, tokenizer).answer(list(enumerate(ROWS)))


def searched(tokenizer: Any, model: Any, row: dict[str, str]) -> tuple[dict[tuple[int, int], float], float]:
    """Return the score of every span that may be an answer, and that of no answer."""
    spans: dict[tuple[int, int], float] = {}
    nulls = []
    for window in TASK.encode(SETTINGS, "predict", [row], tokenizer, 9):
        assert isinstance(window, Window)
        with torch.no_grad():
            output = model(torch.tensor([window.ids]), token_type_ids=torch.tensor([window.type_ids]))
        begin, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        nulls.append(begin[0] + end[0])
        for i, first in enumerate(window.offsets):
            for j, last in enumerate(window.offsets[i : i + 3], i):
                if first is not None and last is not None:
                    place = (first[0], last[1])
                    spans[place] = max(begin[i] + end[j], spans.get(place, -1e9))
    return spans, min(nulls)


def test_the_best_span_over_all_windows_is_the_answer(tokenizer: Any, model: Any) -> None:
    for row, found in zip(ROWS, answers(tokenizer, model), strict=True):
        spans, null = searched(tokenizer, model, row)
        best = sorted(spans, key=lambda place: -spans[place])[:4]
        assert [(one["start"], one["text"]) for one in found["n_best"]] == [(a, row["context"][a:b]) for a, b in best]
        assert [one["score"] for one in found["n_best"]] == pytest.approx([spans[place] for place in best], abs=1e-4)
        assert (found["prediction"], found["start"]) == (found["n_best"][0]["text"], found["n_best"][0]["start"])
        assert found["null_score"] == pytest.approx(null, abs=1e-4)


def test_a_threshold_leaves_questions_without_answer(tokenizer: Any, model: Any) -> None:
    margins = [one["null_score"] - one["score"] for one in answers(tokenizer, model)]
    between = sorted(margins)[1] - 1e-3  # one margin is below it
    spec = replace(SETTINGS.question_answering, null_threshold=between)
    found = answers(tokenizer, model, replace(SETTINGS, question_answering=spec))
    assert [one["prediction"] == "" for one in found] == [margin > between for margin in margins]
    assert [one["start"] is None for one in found] == [margin > between for margin in margins]


def test_blanks_at_the_ends_of_a_token_are_no_answer(tokenizer: Any) -> None:
    window = Window(ids=[1, 2], learned=(), num_tokens=2, is_long=False, offsets=(None, (0, 3)), type_ids=(0, 1))
    logits = np.asarray([[0.0, 1.0], [0.0, 2.0]], np.float32)
    assert best_spans(window, logits, 5, 5) == [((0, 3), 3.0)]
    assert best_spans(replace(window, offsets=(None, None)), logits, 5, 5) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@torch.no_grad()
def test_a_model_beside_an_adapter_reads_question_and_passage_apart(tokenizer: Any, model: Any) -> None:
    settings = replace(SETTINGS, adapter=Adapter(method="lora"), train=Train(precision="float32"))
    adapted = prepare_model(settings, copy.deepcopy(model), tokenizer).eval()
    inputs = {"input_ids": torch.tensor([[2, 4, 3, 5, 6, 3]]), "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]])}
    assert torch.equal(adapted(**inputs).start_logits, model.eval()(**inputs).start_logits)


def test_a_character_of_several_tokens_takes_one_place_among_the_best_spans(tokenizer: Any) -> None:
    offsets = (None, (0, 1), (0, 1), (2, 3))
    window = Window(ids=[1] * 4, learned=(), num_tokens=4, is_long=False, offsets=offsets, type_ids=(0, 1, 1, 1))
    logits = np.asarray([[0.0, 3.0, 2.0, 0.0], [0.0, 3.0, 2.0, 0.5]], np.float32)
    assert best_spans(window, logits, 5, 3) == [((0, 1), 6.0), ((0, 3), 3.5), ((2, 3), 0.5)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_no_answer_and_name_the_row(tokenizer: Any, model: Any, bad: float) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("머버")] = bad
    with pytest.raises(RunError, match="row 0: the model's scores of the places in its passage are not finite"):
        answers(tokenizer, damaged)  # in its last window alone
    assert RUNTIME.answerer(SETTINGS, damaged, tokenizer).answer([(1, ROWS[1])])[0]["prediction"] == "더러"


def test_batches_have_what_the_model_takes(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    row = '{"question": "가나", "context": "다라 마바 사아", "answers": {"text": ["마바"], "answer_start": [3]}}\n'
    (tmp_path / "a.jsonl").write_text(row + row.replace("가나", "가나 다라"))
    examples = RUNTIME.examples(SETTINGS, tmp_path / "a.jsonl", tokenizer, None)
    batch = RUNTIME.collator(SETTINGS, tokenizer, model)([examples[0], examples[1]])
    assert batch["input_ids"].tolist() == [[2, 4, 3, 5, 6, 7, 3, 0], [2, 4, 5, 3, 5, 6, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0], [1] * 8]
    assert batch["token_type_ids"].tolist() == [[0] * 3 + [1] * 4 + [0], [0] * 4 + [1] * 4]
    assert batch["labels"].tolist() == [[4, 4, 7], [5, 5, 8]]
    assert "token_type_ids" not in Collator(0, has_types=False)([examples[0]])


def test_the_loss_is_the_models_own_where_nothing_is_padded_and_does_not_depend_on_padding(model: Any) -> None:
    rows = [[2, 4, 3, 5, 6, 3], [2, 4, 5, 3, 6, 7, 8, 3], [2, 4, 3, 5, 3]]
    examples = [{"input_ids": ids, "token_type_ids": [0] * len(ids), "labels": [3, 4, len(ids)]} for ids in rows]
    collate = Collator(0, has_types=True)

    def loss(*places: int, num_items: int | None = None) -> float:
        batch = collate([examples[place] for place in places])
        labels = batch.pop("labels")
        return float(span_loss(model(**batch), labels, num_items).detach())

    def own(place: int) -> float:
        batch = collate([examples[place]])
        start, end, _ = batch.pop("labels").T
        return float(model(**batch, start_positions=start, end_positions=end).loss.detach())

    owns = [own(place) for place in range(3)]
    assert [loss(place) for place in range(3)] == pytest.approx(owns)
    assert loss(0, 1, 2) == pytest.approx(sum(owns) / 3)
    assert loss(0, 1, num_items=9) + loss(2, num_items=9) == pytest.approx(sum(owns) / 3)


def test_a_row_without_labels_and_a_place_behind_its_window_count_nothing() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    outputs = {"start_logits": logits, "end_logits": logits}
    alone = span_loss({"start_logits": logits[:1], "end_logits": logits[:1]}, torch.tensor([[1, 9, 3]]))
    both = span_loss(outputs, torch.tensor([[1, 9, 3], [-100, -100, -100]]))
    both.backward()
    assert (
        both.tolist() == pytest.approx(alone.tolist()) == pytest.approx((-logits[0, :3].log_softmax(0)[1] / 2).tolist())
    )
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and not logits.grad[1].any()
