"""The generators of the library: the same rows for the same seed, no text in two splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sousbatch.errors import UsageError
from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.data import smalltalk
from sousbatch.recipes.data.generators import GENERATORS

NAMES = sorted(GENERATORS)
COLUMNS = {
    "hangul": {"id", "input", "target"},
    "labels": {"id", "input", "target"},
    "questions": {"id", "question", "context", "answers", "answer_start"},
    "dialogues": {"id", "input", "target"},
    "essays": {"id", "input", "target", "text"},
    "smalltalk": {"id", "input", "target"},
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_seed_and_no_text_is_in_two_splits(name: str) -> None:
    sizes = {"num_train": 60, "num_validation": 20, "num_test": 20}
    first, second = (GENERATORS[name](seed=4, **sizes) for _ in range(2))
    assert first == second != GENERATORS[name](seed=5, **sizes)
    rows = [row for split in ("train", "validation", "test") for row in first[split]]
    assert len(rows) == 100 and all(set(row) == COLUMNS[name] for row in rows)
    texts = {row.get("input", row.get("context")): row["id"].split("-")[0] for row in rows}
    assert all(texts[row.get("input", row.get("context"))] == row["id"].split("-")[0] for row in rows)
    assert name == "smalltalk" or len(texts) == 100  # questions with several answers
    assert len({row["id"] for row in rows}) == 100


def test_answers_begin_where_it_is_said() -> None:
    for row in GENERATORS["questions"](seed=1, num_train=200, num_validation=0, num_test=0)["train"]:
        assert row["context"][row["answer_start"] :].startswith(row["answers"])


def test_what_a_package_ships_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smalltalk, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps chatterbot-corpus"):
        GENERATORS["smalltalk"](seed=1, num_train=1, num_validation=0, num_test=0)


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="at most 200000 rows"):
        GENERATORS["essays"](seed=1, num_train=10**6, num_validation=0, num_test=0)


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama"])
def test_the_tokenizers_of_the_tiny_models_know_every_text(model: str) -> None:
    tokenizer = Tokenizer.from_file(str(Path(LIBRARY_DIR) / "models" / model / "tokenizer.json"))
    unknown = tokenizer.token_to_id("[UNK]" if model == "tiny-bert" else "<unk>")
    for name in set(NAMES) - {"hangul", "smalltalk"}:
        for row in GENERATORS[name](seed=9, num_train=50, num_validation=0, num_test=0)["train"]:
            assert (
                unknown
                not in tokenizer.encode(
                    " ".join(str(row[column]) for column in COLUMNS[name] - {"id", "answer_start"})
                ).ids
            )
