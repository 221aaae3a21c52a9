"""Planning a classification: labels from the rows, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cluster.site import Site
from sousbatch.errors import PlanError, RecipeError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.data import read_splits
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.inspect.labels import read_labels
from sousbatch.recipes.labels import labels_in, ordered
from sousbatch.recipes.plan import Plan
from sousbatch.recipes.tasks.classification import TASK

SITE = Site(name="here", launcher="local", cpus_per_node=2, memory_bytes=10**10, gpus_per_node=0, gpu_memory_bytes=0)
BERT = ["task=classification", "model.path=library:tiny-bert", "model.from_scratch=true"]


def plan(*overrides: str) -> Plan:
    recipe = compose("./small.yaml", [*BERT, *overrides])
    return compile(recipe, SITE, inspect(recipe, Path.cwd()))


def write(split: str, targets: list[Any], inputs: list[str] | None = None) -> None:
    texts = inputs or [f"글 {number}" for number in range(len(targets))]
    rows = [{"input": text, "target": target} for text, target in zip(texts, targets, strict=True)]
    Path(f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def rows(project: Path) -> None:
    for split in ("train", "validation", "test"):
        write(split, ["좋다", "나쁘다", "좋다"])


def labels_of(*overrides: str) -> tuple[str, ...]:
    """Return the labels without a look at the model's shapes, which takes seconds."""
    recipe = compose("./small.yaml", [*BERT, *overrides])
    return read_labels(recipe, recipe.model.config, read_splits(recipe), ())


def said(ask: Callable[..., object], *overrides: str) -> str:
    with pytest.raises(PlanError) as error:
        ask(*overrides)
    return "\n".join(error.value.reasons)


def test_the_labels_are_those_of_the_training_rows_and_go_into_the_models_config() -> None:
    found = plan()
    assert found.inputs.labels == ("나쁘다", "좋다")
    for stage in found.stages:
        assert labels_in(stage.settings.model.config) == ("나쁘다", "좋다")
    assert found.inputs.model.config["label2id"] == {"나쁘다": 0, "좋다": 1}
    assert found.stage("score").settings.score.metrics == ("accuracy", "macro_f1")


@pytest.mark.parametrize(
    ("targets", "labels"),
    [([10, 9, 2], ("2", "9", "10")), ([True, False, "true"], ("false", "true")), (["b ", "a", "b"], ("a", "b"))],
)
def test_labels_may_be_numbers_and_truths(targets: list[Any], labels: tuple[str, ...]) -> None:
    for split in ("train", "validation", "test"):
        write(split, targets)
    assert labels_of() == labels


def test_a_model_that_knows_the_same_labels_keeps_their_order() -> None:
    own = {"id2label": {"0": "좋다", "1": "나쁘다"}}
    assert ordered({"나쁘다", "좋다"}, own) == ("좋다", "나쁘다")
    assert ordered({"나쁘다", "그저"}, own) == ("그저", "나쁘다")
    assert labels_of("+model.config.id2label={0: 좋다, 1: 나쁘다}") == ("좋다", "나쁘다")


def test_labels_that_training_does_not_know_are_named_with_their_rows() -> None:
    write("test", ["좋다", "글쎄", "몰라", "글쎄"])
    reason = said(labels_of)
    assert "split 'test' has labels in column 'target'" in reason
    assert "the 2 labels of training ('나쁘다', '좋다'): '글쎄' in 2 rows (row 2, 4), '몰라' in 1 row (row 3)" in reason


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["a", "a"], "split 'train' has one label, 'a', in column 'target'"),
        (["a"], "split 'train' has one label"),
        (
            ["a", "", "b", "  "],
            "split 'train' has 2 rows (row 2, 4) whose column 'target' (data.columns.target) holds no",
        ),
        ([0.5, "a", 1.0], "split 'train' has 1 row (row 1) whose column 'target'"),
        (["a", None], "row 2 of split 'train' has null in column 'target'"),
    ],
)
def test_rows_without_a_label_and_one_label_alone_are_refused(targets: list[Any], reason: str) -> None:
    for split in ("train", "validation", "test"):
        write(split, targets)
    assert reason in said(labels_of)


def test_labels_that_look_alike_are_mentioned() -> None:
    found = plan()
    inputs = replace(found.inputs, labels=("Good", "good", "좋다"))
    warnings = list(TASK.warnings(found.stage("train"), inputs))
    assert warnings == ["stage 'train': labels 'Good', 'good' differ by blanks or capitals alone"]


def test_texts_longer_than_the_model_are_refused_and_can_be_cut() -> None:
    write("train", ["좋다", "나쁘다"], ["짧다", "가 " * 900])
    reason = said(plan, "data.max_tokens=600", "data.long_rows=cut_right")
    assert "a row has 902 tokens, and the model takes 512; set data.max_tokens=512" in reason
    assert "1 of 2 rows (row 2) are longer than data.max_tokens=32" in said(plan)
    assert plan("data.long_rows=cut_right").inputs.lengths[0].longest_kept == 32


def test_a_model_that_reads_padding_is_to_train_as_it_will_be_asked() -> None:
    found = plan()
    config = {**found.inputs.model.config, "model_type": "fnet"}
    inputs = replace(found.inputs, model=replace(found.inputs.model, config=config))
    for micro_batch, expected in ((2, 1), (1, 0)):
        recipe = compose("./small.yaml", [*BERT, f"train.micro_batch={micro_batch}"])
        said = [one for one in compile(recipe, SITE, inputs).warnings if "reads the padding" in one]
        assert len(said) == expected


def test_a_model_without_a_trained_head_is_trained_and_not_asked() -> None:
    found = plan("checkpoints.metric=macro_f1")  # which asks it while it trains
    recipe = compose("./small.yaml", [*BERT[:2], "stages={predict: {}}"])

    def ask(task: str, architecture: str) -> Plan:
        config = {**found.inputs.model.config, "architectures": [architecture]}
        model = replace(found.inputs.model, has_weights=True, config=config)
        return compile(replace(recipe, task=task), SITE, replace(found.inputs, model=model))

    with pytest.raises(PlanError, match=r"was not trained for task classification \(it is BertModel\)"):
        ask("classification", "BertModel")
    with pytest.raises(PlanError, match=r"was not trained for task question_answering \(it is BertForMaskedLM\)"):
        ask("question_answering", "BertForMaskedLM")
    ask("classification", "BertForSequenceClassification")


@pytest.mark.parametrize("weights", ["most", "{좋다: 0}", "3"])
def test_class_weights_are_balanced_or_a_number_for_each_label(weights: str) -> None:
    with pytest.raises(RecipeError, match="balanced"):
        compose("./small.yaml", [*BERT, f"train.class_weights={weights}"])
    assert "train.class_weights names '그저'" in said(plan, "train.class_weights={그저: 2}")


def test_class_weights_of_labels_that_yaml_reads_as_truths() -> None:
    for split in ("train", "validation", "test"):
        write(split, [True, False])
    assert plan("train.class_weights={true: 1, false: 3}").stage("train").settings.train.class_weights == {
        "true": 1.0,
        "false": 3.0,
    }
    for split in ("train", "validation", "test"):
        write(split, ["yes", "no"])
    text = Path("small.yaml").read_text()
    Path("small.yaml").write_text(text.replace("train: {", "train: {class_weights: {yes: 1, no: 3}, "))
    assert "known: 'no', 'yes'; YAML reads yes, no, on and off as true or false: write them in quotes" in said(plan)


def test_class_weights_of_a_task_without_labels_are_refused(project: Path) -> None:
    with pytest.raises(RecipeError, match="train.class_weights has no effect on causal_lm"):
        compose("./small.yaml", ["train.class_weights=balanced"])
