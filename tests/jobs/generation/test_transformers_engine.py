"""Answers depend on the row alone, not on the rest of its batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import sousbatch.recipes
from sousbatch.recipes.schema import Data, Model, Predict, Recipe

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
ROWS = [(number, {"input": text}) for number, text in enumerate(["가", "나다라", "마바", "사아자차카", "타"])]
RECIPE = Recipe(
    model=Model(path="x"),
    data=Data(prompt="{input}", separator="<sep>"),
    predict=Predict(max_new_tokens=8, batch_rows=2),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY)).save_pretrained(folder)
    return folder


def answers(recipe, model_dir, rows):
    from sousbatch.jobs.tasks import load_model

    return load_model(recipe, model_dir, TINY, "cpu", "float32").answerer(recipe).answer(rows)


@pytest.mark.parametrize("sample", [False, True])
def test_a_row_gets_the_same_answer_in_any_batch(model_dir, sample):
    recipe = replace(RECIPE, predict=replace(RECIPE.predict, sample=sample))
    together = answers(recipe, model_dir, ROWS)
    alone = [
        answers(replace(recipe, predict=replace(recipe.predict, batch_rows=1)), model_dir, [row])[0] for row in ROWS
    ]
    assert together == alone


def test_another_seed_draws_other_answers(model_dir):
    recipe = replace(RECIPE, predict=replace(RECIPE.predict, sample=True))
    assert answers(recipe, model_dir, ROWS) != answers(replace(recipe, seed=1), model_dir, ROWS)


def test_drawing_follows_the_distribution(model_dir):
    """With top_k 1 only the likeliest token is left, so a draw is what greedy decoding gives."""
    greedy = answers(RECIPE, model_dir, ROWS)
    drawn = replace(RECIPE, predict=replace(RECIPE.predict, sample=True, top_k=1))
    assert answers(drawn, model_dir, ROWS) == greedy
