"""The demo's data and its tokenizer: the same everywhere, no leak, exact both ways."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest

from sousbatch import recipes
from sousbatch.errors import UsageError
from sousbatch.files import digest_of
from sousbatch.recipes.data import hangul

MODEL_DIR = Path(recipes.__file__).parent / "library" / "models" / "tiny-hangul"
SYLLABLES = [chr(code) for code in range(ord("가"), ord("힣") + 1)]
ASCII = [chr(code) for code in range(0x20, 0x7F)]

Splits = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return hangul.generate(seed=7, num_train=20_000, num_validation=300, num_test=500)


def copy_score(rows: list[dict[str, str]]) -> float:
    pairs = [pair for row in rows for pair in zip(row["input"], row["target"], strict=True)]
    return sum(copied == wanted for copied, wanted in pairs) / len(pairs)


def test_a_seed_gives_the_same_rows_on_every_python() -> None:
    rows = hangul.generate(seed=3, num_train=200, num_validation=20, num_test=20)
    assert digest_of(rows) == "d173ff4b2968982b99cf685956102115e9c8a82517e4f97a048292b4bb95f42c"


def test_another_seed_gives_other_sentences() -> None:
    first, second = (hangul.generate(seed=seed, num_train=0, num_validation=0, num_test=50) for seed in (1, 2))
    assert {row["target"] for row in first["test"]} != {row["target"] for row in second["test"]}


def test_the_test_rows_do_not_depend_on_the_size_of_train(splits: Splits) -> None:
    assert hangul.generate(seed=7, num_train=10, num_validation=0, num_test=500)["test"] == splits["test"]


def test_no_sentence_is_in_two_splits_or_twice_in_one(splits: Splits) -> None:
    targets = {name: [row["target"] for row in rows] for name, rows in splits.items()}
    assert len({*targets["train"], *targets["validation"], *targets["test"]}) == 20_000 + 300 + 500
    assert targets["test_other_mix"] == targets["test"]


def test_ids_name_the_split_and_the_row(splits: Splits) -> None:
    assert [rows[17]["id"] for rows in splits.values()] == [f"{name}-000017" for name in splits]


@pytest.mark.parametrize("split", ["train", "test", "test_other_mix"])
def test_a_copied_input_has_about_two_fifths_of_its_characters_right(splits: Splits, split: str) -> None:
    assert 0.37 < copy_score(splits[split]) < 0.43


def test_the_other_mix_obfuscates_otherwise(splits: Splits) -> None:
    pairs = zip(splits["test"], splits["test_other_mix"], strict=True)
    assert sum(main["input"] == other["input"] for main, other in pairs) < 5


def test_every_sentence_is_short_and_keeps_its_length(splits: Splits) -> None:
    for row in (row for rows in splits.values() for row in rows):
        assert 0 < len(row["target"]) == len(row["input"]) <= hangul.MAX_CHARS
        assert unicodedata.is_normalized("NFC", row["input"] + row["target"])


def test_no_rule_touches_a_sentence_when_all_chances_are_zero() -> None:
    never = hangul.Mix(liaison=0, onset=0, y_vowel=0, like_vowel=0, changed_final=0, added_final=0)
    assert hangul.obfuscate("2박 했는데 값이 좋았어요!", random.Random(1), never) == "2박 했는데 값이 좋았어요!"
    assert hangul.obfuscate("", random.Random(1), hangul.MAIN_MIX) == ""


def test_more_sentences_than_the_grammar_can_give_are_refused() -> None:
    with pytest.raises(UsageError, match="at most 200000"):
        hangul.generate(seed=1, num_train=10**7, num_validation=0, num_test=0)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]  # tokenizers has no types
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.mark.parametrize(("characters", "tokens_each"), [(SYLLABLES, 3), ([*ASCII, "\n"], 1)])
def test_every_character_comes_back_from_its_tokens(tokenizer, characters: list[str], tokens_each: int) -> None:  # type: ignore[no-untyped-def]
    encodings = tokenizer.encode_batch(characters, add_special_tokens=False)
    assert {len(encoding.ids) for encoding in encodings} == {tokens_each}
    decoded = tokenizer.decode_batch([encoding.ids for encoding in encodings])
    assert [unicodedata.normalize("NFC", text) for text in decoded] == characters


def test_the_data_comes_back_and_keeps_input_and_target_aligned(tokenizer, splits: Splits) -> None:  # type: ignore[no-untyped-def]
    unknown = tokenizer.token_to_id("<unk>")
    for row in splits["test"] + splits["test_other_mix"]:
        source, target = (tokenizer.encode(row[column]).ids for column in ("input", "target"))
        assert len(source) == len(target) <= 3 * hangul.MAX_CHARS
        assert unknown not in source + target
        assert unicodedata.normalize("NFC", tokenizer.decode(target)) == row["target"]


def test_special_tokens_are_read_from_text_and_left_out_of_it(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode("<pad><bos><eos><unk><sep>").ids
    assert ids == [0, 1, 2, 3, 4]
    assert tokenizer.decode(ids) == ""


def test_the_shipped_folder_loads_as_a_model_and_a_tokenizer() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL_DIR))
    assert len(tokenizer) == model.config.vocab_size == 169
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id) == (0, 2, 4)
    assert sum(parameter.numel() for parameter in model.parameters()) == 349_952
