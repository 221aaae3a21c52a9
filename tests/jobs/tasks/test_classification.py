"""Classifying in the jobs: weights of labels, the loss of a step, and what an answer holds."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BigBirdConfig,
    FNetConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    MobileBertConfig,
    XLNetConfig,
    XLNetForSequenceClassification,
    YosoConfig,
)

import sousbatch.recipes
from sousbatch.errors import RunError
from sousbatch.jobs.tasks.classification import RUNTIME, balanced_weights
from sousbatch.jobs.training.model import attend_by_length
from sousbatch.recipes.labels import with_labels
from sousbatch.recipes.schema import Model, Recipe, StageSettings, Train

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
SETTINGS: StageSettings = with_labels(Recipe(task="classification", model=Model(path="x")), ("no", "yes"))
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
LOGITS = {"logits": torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]])}
LABELS = torch.tensor([0, 1, 0])


def loss(weights: Any, *, num_items: Any = None) -> torch.Tensor:
    assert RUNTIME.loss is not None
    settings = replace(SETTINGS, train=Train(class_weights=weights))
    examples: Any = SimpleNamespace(labels=LABELS.tolist())
    return RUNTIME.loss(settings, examples)(LOGITS, LABELS, num_items)


def test_balanced_weights_let_all_labels_count_alike() -> None:
    assert balanced_weights([0, 0, 0, 1], 2) == [4 / 6, 2.0]
    assert balanced_weights([0, 0], 2)[1] == 1.0


@pytest.mark.parametrize(
    ("given", "weights"),
    [(None, [1.0, 1.0]), ("balanced", [0.75, 1.5]), ({"yes": 3}, [1.0, 3.0])],
)
def test_the_loss_weighs_each_row_by_its_label(given: Any, weights: list[float]) -> None:
    rows = cross_entropy(LOGITS["logits"], LABELS, reduction="none") * torch.tensor(weights)[LABELS]
    assert torch.allclose(loss(given), rows.mean())
    assert torch.allclose(loss(given, num_items=6), rows.sum() / 6)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2, **SETTINGS.model.config)
    return GPT2ForSequenceClassification(config).eval()


def test_an_answer_is_the_likeliest_label_with_the_probability_of_each(model: Any) -> None:
    assert model.config.pad_token_id is None
    rows = [(0, {"input": "가나다"}), (1, {"input": ""}), (2, {"input": "마"})]
    answers = RUNTIME.answerer(SETTINGS, model, AutoTokenizer.from_pretrained(TINY)).answer(rows)
    for answer in answers:
        likeliest = max(range(2), key=answer["probabilities"].__getitem__)
        assert answer["prediction"] == ("no", "yes")[likeliest]
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        FNetConfig(vocab_size=512, **SMALL),
        MobileBertConfig(
            vocab_size=512,
            **SMALL,
            num_attention_heads=2,
            intra_bottleneck_size=16,
            embedding_size=16,
            classifier_activation=False,
        ),
        YosoConfig(vocab_size=512, **SMALL, num_attention_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_reads_padding_answers_each_row_alone(config: Any) -> None:
    torch.manual_seed(0)
    config.update(SETTINGS.model.config)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    answerer = RUNTIME.answerer(SETTINGS, model, AutoTokenizer.from_pretrained(TINY))
    short, long = (0, {"input": "가"}), (1, {"input": "나다라마바사"})
    assert answerer.answer([short, long])[0] == answerer.answer([short])[0]


def test_a_bigbird_answers_alike_in_every_order_and_beside_every_row() -> None:
    torch.manual_seed(0)
    sizes = SMALL | {"num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 2, "num_random_blocks": 1}
    config = BigBirdConfig(vocab_size=512, **sizes, **SETTINGS.model.config)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    alone = []
    for row in (short := {"input": "가"}), (long := {"input": "나다라마바사" * 5}), (longest := {"input": "나" * 32}):
        ids = torch.tensor([AutoTokenizer.from_pretrained(TINY)(row["input"])["input_ids"]])
        with torch.no_grad():  # a model of its own for each row: a BigBird has no way back from full attention
            alone.append(copy.deepcopy(model)(input_ids=ids).logits[0].softmax(-1).tolist())
    attend_by_length(model)
    answerer = RUNTIME.answerer(SETTINGS, model, AutoTokenizer.from_pretrained(TINY))
    answers = [one for row in (short, long, longest) for one in answerer.answer([(0, row)])]
    together = answerer.answer([(0, short), (1, long), (2, longest)])
    for found in (answers, together):
        assert [one["probabilities"] for one in found] == [pytest.approx(values, abs=1e-5) for values in alone]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_no_answer_and_name_the_row(model: Any, bad: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    only_there = set(tokenizer("마")["input_ids"]) - set(tokenizer("가나다")["input_ids"])
    with torch.no_grad():
        model.transformer.wte.weight[sorted(only_there)] = bad
    rows = [(30, {"input": "가나다"}), (31, {"input": "나마"}), (32, {"input": "다"})]
    with pytest.raises(RunError, match="row 31: the model's scores of the labels are not finite numbers"):
        RUNTIME.answerer(SETTINGS, model, tokenizer).answer(rows)
    assert len(RUNTIME.answerer(SETTINGS, model, tokenizer).answer(rows[:1])) == 1


def test_a_model_that_reads_the_last_place_finds_no_padding_there() -> None:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=512, d_model=16, n_layer=1, n_head=2, d_inner=16, **SETTINGS.model.config)
    model, tokenizer = XLNetForSequenceClassification(config).eval(), AutoTokenizer.from_pretrained(TINY)
    rows = [(0, {"input": "가나다"}), (1, {"input": "마바사 아자차카타파하"})]
    answerer = RUNTIME.answerer(SETTINGS, model, tokenizer)
    together, alone = answerer.answer(rows), [answerer.answer([row])[0] for row in rows]
    assert together[0]["probabilities"] == pytest.approx(alone[0]["probabilities"], abs=1e-5)
    batch = RUNTIME.collator(SETTINGS, tokenizer, model)(
        [{"input_ids": [7], "labels": 0}, {"input_ids": [8, 9], "labels": 1}]
    )
    assert batch["input_ids"][:, -1].tolist() == [7, 9]
