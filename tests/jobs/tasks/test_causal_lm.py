"""Rows to tokens: prompt, padding, separator, response, and what counts in the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import sousbatch.recipes
from sousbatch.errors import RunError
from sousbatch.jobs.tasks import IGNORED_LABEL
from sousbatch.jobs.tasks.causal_lm import Collator, load_examples
from sousbatch.recipes.data.encode import encode_prompts, render_prompt
from sousbatch.recipes.schema import Columns, Data, Recipe

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
SPEC = Data(prompt="{input}", separator="<sep>", pad_input_to=9, max_tokens=40)
ROWS = [{"input": "가나", "target": "다"}, {"input": "라", "target": "마바"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def data(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    return write


def examples(spec, path, tokenizer):
    return load_examples(Recipe(data=spec), path, tokenizer)


def test_only_the_response_and_its_end_count_in_the_loss(tokenizer, data):
    row = examples(SPEC, data(ROWS), tokenizer)[0]
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED_LABEL]
    assert counted == [*tokenizer("다")["input_ids"], tokenizer.eos_token_id]


def test_loss_on_all_counts_every_token(tokenizer, data):
    row = examples(replace(SPEC, loss_on="all"), data(ROWS), tokenizer)[0]
    assert row["labels"] == row["input_ids"]


def test_every_prompt_is_filled_up_to_one_width_before_the_separator(tokenizer):
    ids = [prompt.ids for prompt in encode_prompts(SPEC, ROWS, tokenizer, None)]
    separator = tokenizer("<sep>")["input_ids"]
    assert [len(row) for row in ids] == [10, 10]
    assert [row[-1:] for row in ids] == [separator, separator]
    assert ids[1][3:9] == [tokenizer.pad_token_id] * 6


def test_training_and_predicting_see_the_same_prompt(tokenizer, data):
    row = examples(SPEC, data(ROWS), tokenizer)[1]
    prompt = encode_prompts(SPEC, ROWS, tokenizer, None)[1].ids
    assert row["input_ids"][: len(prompt)] == prompt


def test_plain_text_trains_on_whole_lines(tokenizer, data):
    spec = replace(SPEC, prompt="", loss_on="all")
    row = examples(spec, data([{"text": "가"}]), tokenizer)[0]
    assert row["input_ids"] == [*tokenizer("가")["input_ids"], tokenizer.eos_token_id] == row["labels"]


def test_a_row_that_is_too_long_is_refused_by_its_number(tokenizer, data):
    with pytest.raises(RunError, match="row 2 .* data.max_tokens is 14"):
        examples(replace(SPEC, max_tokens=14), data(ROWS), tokenizer)


@pytest.mark.parametrize(("policy", "num_rows"), [("drop", 1), ("cut_right", 2), ("cut_left", 3)])
def test_long_rows_are_dropped_or_cut_on_the_named_side(tokenizer, data, policy, num_rows):
    """The prompt alone may be above max_tokens: cut on the right such a row has nothing to learn, and is left out."""
    spec = Data(prompt="{input}=", max_tokens=len(tokenizer("가나다라마바사아자차=다")["input_ids"]), long_rows=policy)
    inputs = ("가나", "가나다라마바사아자차", "가나다라마바사아자차" * 40)
    rows = examples(spec, data([{"input": text, "target": "다"} for text in inputs]), tokenizer)
    seen = [row["input_ids"] for row in rows]
    assert all(len(ids) <= spec.max_tokens for ids in seen)
    assert len(seen) == num_rows
    assert all(any(label != IGNORED_LABEL for label in row["labels"][1:]) for row in rows)
    batch = Collator(0)(list(rows))
    assert batch["input_ids"].shape == batch["labels"].shape


def test_data_in_which_nothing_counts_is_refused(tokenizer, data):
    with pytest.raises(RunError, match="no row .* counts in the loss"):
        examples(replace(SPEC, max_tokens=8, long_rows="cut_right"), data(ROWS), tokenizer)


def test_a_template_knows_our_words_and_the_files_own(tokenizer):
    spec = Data(prompt="{tone}: {input}", columns=Columns(input="dialogue"))
    assert render_prompt(spec, {"dialogue": "hi {there}", "tone": "kind"}, tokenizer) == "kind: hi {there}"


def test_a_batch_is_padded_on_the_right_and_its_padding_is_masked(tokenizer, data):
    rows = examples(SPEC, data(ROWS), tokenizer)
    batch = Collator(tokenizer.pad_token_id)([rows[0], rows[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 17)
    assert batch["attention_mask"].tolist() == [[1] * 14 + [0] * 3, [1] * 17]
    assert torch.all(batch["labels"][0, 14:] == IGNORED_LABEL)
    # padding inside the fixed width is attended to, or positions would shift
    assert batch["attention_mask"][1, :10].tolist() == [1] * 10
