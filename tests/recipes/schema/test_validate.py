"""The walk over the dataclasses: every fault at once, each with the right word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sousbatch.recipes.schema import Recipe, validate


def _faults(values: Any) -> list[str]:
    found = [*validate.build(Recipe, values)[1], *validate.unknown_names(Recipe, values)]
    return [str(fault) for fault in found]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"trian": {}}, "trian is not a key (did you mean 'train'?)"),
        ({"train": {"lr": 1}}, "train.lr is another library's word (here it is train.learning_rate)"),
        ({"num_train_epochs": 3}, "num_train_epochs is another library's word (here it is train.epochs)"),
        ({"train": {"bf16": True}}, "train.bf16 is another library's word (here it is train.precision)"),
        ({"train": {"warmup_ratio": 0}}, "train.warmup_ratio is not a key (it is train.schedule.warmup_ratio)"),
        ({"train": 5}, "train is 5 (a section of keys is expected, such as train.split)"),
        (
            {"resources": {"nodes": 2}},
            "resources.nodes is 2 (the name of a stage comes before it, as in resources.train.nodes)",
        ),
        ({"train": {"steps": 0}}, "train.steps is 0 (at least 1)"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate is 0.0 (above 0)"),
        ({"seed": 2**32}, "seed is 4294967296 (at most 4294967295)"),
        ({"train": {"steps": 1.5}}, "train.steps is 1.5 (a whole number is expected)"),
        ({"train": {"steps": True}}, "train.steps is True (a whole number is expected)"),
        ({"train": {"epochs": "many"}}, "train.epochs is 'many' (a finite number is expected)"),
        ({"train": {"epochs": float("inf")}}, "train.epochs is inf (a finite number is expected)"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate is nan (a finite number is expected)"),
        ({"name": 7}, "name is 7 (text, in quotes, is expected)"),
        ({"model": {"from_scratch": "yes"}}, "model.from_scratch is 'yes' (true or false is expected)"),
        (
            {"model": {"freeze": "layers:0-3"}},
            "model.freeze is 'layers:0-3' (a list is expected, such as [layers:0-3])",
        ),
        (
            {"model": {"config": {"a": [1, float("nan")]}}},
            "model.config.a.1 is nan (text or a finite number is expected)",
        ),
        ({"environment": {"variables": {"A": 1}}}, "environment.variables.A is 1 (text, in quotes, is expected)"),
        (
            {"resources": {"a": {"mem": 2}}},
            "resources.a.mem is another library's word (here it is resources.*.memory_gb)",
        ),
        (
            {"tracking": {"trackers": ["wanb"]}},
            "tracking.trackers.0 is 'wanb'; known: wandb, tensorboard, trackio (did you mean 'wandb'?)",
        ),
        (
            {"score": {"metrics": ["cer", "rouge3"]}},
            "score.metrics.1 is 'rouge3'; known: character_accuracy, cer, wer, exact_match, accuracy, macro_f1, "
            "label_f1, rouge, rouge1, rouge2, rougeL, rougeLsum, bleu, chrf, "
            "squad_em, squad_f1, korquad_em, korquad_f1 (did you mean 'rouge'?)",
        ),
        ({"score": {"tokenizer": "bytes"}}, "score.tokenizer is 'bytes'; known: words, characters, morphemes"),
        (
            {"train": {"optimizer": "adam"}},
            "train.optimizer is 'adam'; known: adamw, adamw_fused, adamw_8bit, paged_adamw, paged_adamw_8bit, "
            "fused_adam, cpu_adam, adafactor (did you mean 'adamw'?)",
        ),
        ([1], "recipe is [1] (a section of keys is expected, such as task)"),
    ],
    ids=str,
)
def test_a_fault_says_what_is_wrong_and_what_would_be_right(values: Any, fault: str) -> None:
    assert _faults(values) == [fault]


@pytest.mark.parametrize(
    "section, key, group", [("score", "metrics", "sousbatch.metrics"), ("tracking", "trackers", "sousbatch.trackers")]
)
def test_a_recipe_takes_the_names_that_installed_packages_add(
    third_party: Callable[..., None], section: str, key: str, group: str
) -> None:
    third_party(group, "toy = toy_module:TOY", "")
    values = {section: {key: ["toy"]}}
    recipe, _ = validate.build(Recipe, values)
    assert _faults(values) == [] and getattr(getattr(recipe, section), key) == ("toy",)
    assert next(one.takes for one in validate.options(Recipe) if one.key == f"{section}.{key}").endswith(" | toy")


def test_all_faults_come_at_once() -> None:
    assert len(_faults({"trian": 1, "train": {"lr": 1, "steps": -1, "zero": {"stage": 4}}, "seed": "x"})) == 5


def test_each_item_of_a_list_is_in_the_range_of_its_key() -> None:
    assert _faults({"checkpoints": {"keep_steps": [5, 0]}}) == ["checkpoints.keep_steps.1 is 0 (at least 1)"]


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", 0.0001])
def test_a_number_may_come_as_text(text: object) -> None:  # YAML 1.1 reads 1e-4 as text
    recipe, _ = validate.build(Recipe, {"train": {"learning_rate": text}})
    assert recipe is not None and recipe.train.learning_rate == 1e-4


def test_a_section_left_empty_has_its_defaults() -> None:
    assert validate.build(Recipe, {"train": None, "resources": None}) == (Recipe(), [])


def test_plain_values_and_recipe_are_each_others_inverse() -> None:
    values = {
        "name": "a",
        "data": {"generator": {"seed": 3}},
        "question_answering": {"n_best": 5},
        "resources": {"train": {"nodes": 2}},
    }
    recipe, _ = validate.build(Recipe, values)
    assert validate.build(Recipe, validate.to_plain(recipe)) == (recipe, [])


def test_every_key_has_help_and_says_what_it_takes() -> None:
    lacking = [option.key for option in validate.options(Recipe) if not option.help or option.takes == "value"]
    assert lacking == []


def test_no_foreign_word_is_a_key_beside_the_key_that_it_means() -> None:
    keys = {option.key for option in validate.options(Recipe)}
    siblings = {
        f"{option.key.rpartition('.')[0]}.{word}".lstrip(".")
        for option in validate.options(Recipe)
        for word in option.also
    }
    assert keys & siblings == set()


def test_defaults_are_sound() -> None:
    assert validate.build(Recipe, validate.to_plain(Recipe())) == (Recipe(), [])
