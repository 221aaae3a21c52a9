"""Tokens are added from files and from the training text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import UsageError
from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.data import read_splits
from sousbatch.recipes.inspect.tokenizer import load_full
from sousbatch.recipes.inspect.tokens import answer, find_tokens
from sousbatch.recipes.schema import Recipe
from sousbatch.recipes.schema.validate import to_plain
from sousbatch.recipes.stages import with_tokens

FOLDER = LIBRARY_DIR / "models" / "tiny-hangul"  # its tokens are letters
WORDS = ["정말", "아름다운", "가게", "맛있는", "커피", "친절한", "사장님", "다시", "갑니다"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Rows of training text: words in every order, and one row of messages."""
    rows = [
        {"input": " ".join(WORDS[number % 9 :] + WORDS[: number % 7]), "target": WORDS[number % 5]}
        for number in range(300)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(text: Path, **values: Any) -> Any:
    request = {"folder": str(FOLDER), "add_tokens": [], "trusts_code": False, "num_trained": None, "file": None}
    return answer({**request, "texts": [[str(text), ["input", "target"]]], **values})


def test_pieces_of_a_model_trained_on_the_text_make_its_rows_shorter(text: Path) -> None:
    found = asked(text, num_trained=12)
    assert len(found.added) == len(set(found.added)) == 12 and {"정말", "아름다운"} <= set(found.added)
    assert found.after < found.before / 2
    assert asked(text, num_trained=12) == found, "the same text gives the same tokens"
    tokenizer = load_full(FOLDER, found.added, trusts_code=False)
    sentence = "정말 아름다운 가게"
    decoded = tokenizer.decode(tokenizer(sentence, add_special_tokens=False)["input_ids"])
    assert unicodedata.normalize("NFC", decoded) == sentence
    assert tokenizer.convert_tokens_to_ids(found.added[0]) == tokenizer.num_known


def test_what_the_tokenizer_has_is_left_out(text: Path, tmp_path: Path) -> None:
    known = next(token for token in load_full(FOLDER, [], trusts_code=False).get_vocab() if len(token) == 1)
    path = tmp_path / "words.txt"
    path.write_text(f"\ufeff정말\n{known}\n\n정말\n아름다운\n", encoding="utf-8")
    found = asked(text, file=str(path))
    assert found.added == ("정말", "아름다운") and found.after < found.before
    assert asked(text, file=str(path), add_tokens=["정말"]).added == ("아름다운",)
    path.write_text(f"{known}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no token that the tokenizer does not have already"):
        asked(text, file=str(path))
    path.write_bytes("정말".encode("cp949"))
    with pytest.raises(UsageError, match="not UTF-8 text"):
        asked(text, file=str(path))


def test_a_sentencepiece_model_and_its_vocabulary_give_the_same_tokens(text: Path, tmp_path: Path) -> None:
    import sentencepiece

    lines = [row["input"] for row in map(json.loads, text.read_text(encoding="utf-8").splitlines())]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    of_model, of_vocab = (set(asked(text, file=str(tmp_path / f"spm.{end}")).added) for end in ("model", "vocab"))
    assert (
        of_model == of_vocab and "아름다운" in of_model and not any("<" in one or "\u2581" in one for one in of_model)
    )
    (tmp_path / "bad.model").write_bytes(b"words")
    with pytest.raises(UsageError, match="not a SentencePiece model"):
        asked(text, file=str(tmp_path / "bad.model"))


def found_by(project: Path, source: str) -> Recipe:
    """Return the recipe of the project with the tokens that *source* gives it."""
    recipe = compose("./small.yaml", [f"model.add_tokens_from={source}", "model.add_tokens=[one]"])
    splits = read_splits(recipe)
    return with_tokens(recipe, find_tokens(recipe, project / "model", splits, ()))


def test_the_tokens_that_are_found_follow_those_of_the_recipe(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks: list[Any] = []

    def ask(named: str, request: dict[str, Any]) -> Any:
        asks.append(json.loads(json.dumps(request)))
        return to_plain(answer(asks[-1]))

    monkeypatch.setattr("sousbatch.recipes.inspect.tokens._ask", ask)
    Path("words.txt").write_text("train 1\ntrain 2\n")
    model = found_by(project, "words.txt").model
    assert model.add_tokens == ("one", "train 1", "train 2") and model.add_tokens_from is None
    found_by(project, "words.txt")
    assert len(asks) == 1, "they are remembered"
    Path("words.txt").write_text("train 3\n")
    assert found_by(project, "words.txt").model.add_tokens == ("one", "train 3")


def test_a_source_of_tokens_that_is_none_is_one_line(project: Path) -> None:
    with pytest.raises(UsageError, match=r"add_tokens_from 'nowhere.txt' does not exist: .*spm:N to train N tokens"):
        found_by(project, "nowhere.txt")
    with pytest.raises(UsageError, match="write spm:N with the number of tokens to train"):
        found_by(project, "spm:many")
