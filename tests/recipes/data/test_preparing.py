"""Rows on their way through the steps: what changes, what is dropped, and how each step is counted."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import UsageError
from sousbatch.recipes.data import hangul
from sousbatch.recipes.data.chat import turns_of
from sousbatch.recipes.data.own_functions import OwnFunction, find_source
from sousbatch.recipes.data.preparing import Preparation, Steps, step_faults, steps_of
from sousbatch.recipes.facts import Rows, StepCount
from sousbatch.recipes.schema import Augment, Bm25, Columns, Data, Select, StageSettings

STEPS = Steps(columns=("input", "target"), input_column="input", target_column="target", search_column="input")
OWN = """
def mark(row):
    return None if row["input"] == "drop" else {**row, "input": row["input"] + "!"}

def raises(row):
    return {**row, "input": 1 / (len(row["input"]) - 4)}

def text(row):
    return row["input"]

def deep(row):
    return {**row, "input": {"set": {1}}}

def pairs(row, chance):
    return [{**row, "input": f"{chance.random()}"} for _ in range(2)]

def short(row):
    return len(row["input"]) < 3

def maybe(row):
    return row["input"]
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_steps_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda key, name: OwnFunction(key, name.replace("own:", "own_steps_of_a_test:"), "train")


def _prepare(steps: Steps, rows: Sequence[Any], load: Any = None) -> tuple[list[Any], tuple[StepCount, ...]]:
    preparation = Preparation(rows, steps, load, io.BytesIO)
    made = [row for _, row in preparation]
    return made, preparation.counts


def _inputs(*texts: str) -> list[dict[str, str]]:
    return [{"input": text, "target": "t", "other": "<b>"} for text in texts]


def test_texts_are_cleaned_in_the_order_of_the_steps_and_other_columns_stay() -> None:
    rows, counts = _prepare(replace(STEPS, clean=("html", "blanks", "drop_empty")), _inputs("<b>a</b>", "b", "<br>"))
    assert rows == _inputs("a", "b")
    assert counts == (
        StepCount(name="clean html", changed=Rows(num=2, first=(1, 3))),
        StepCount(name="clean blanks", changed=Rows(num=2, first=(1, 3))),
        StepCount(name="clean drop_empty", dropped=Rows(num=1, first=(3,))),
    )


CONVERSATIONS = {
    "content": [{"role": "user", "content": " a  b "}, {"role": "assistant", "content": "c"}],
    "ShareGPT": [{"from": "human", "value": " a  b "}, {"from": "gpt", "value": "c"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " a  b "}]}, {"role": "assistant", "content": "c"}],
    "JSON": '[{"role": "user", "content": " a  b "}, {"role": "assistant", "content": "c"}]',
}


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_the_messages_of_a_conversation_are_cleaned_and_searched_in_each_form(form: str) -> None:
    steps = steps_of(
        StageSettings(
            data=Data(
                prompt="messages", clean=("blanks", "min_chars:4"), select=Select(bm25=Bm25(queries=("b",), column="m"))
            )
        ),
        "train",
    )
    assert steps is not None
    rows, _ = _prepare(replace(steps, columns=("m",), conversation_column="m"), [{"m": CONVERSATIONS[form]}])
    assert [turn["content"] for turn in turns_of(rows[0]["m"])] == ["a b", "c"]


@pytest.mark.parametrize("form", ["text", "list", "datasets", "squad"])
def test_answers_are_cleaned_as_their_passage_is(form: str) -> None:
    forms: dict[str, Callable[[str], Any]] = {
        "text": lambda said: said,
        "list": lambda said: [said],
        "datasets": lambda said: {"text": [said], "answer_start": [0]},
        "squad": lambda said: [{"text": said, "answer_start": 0}],
    }
    steps = replace(STEPS, clean=("unicode",), columns=("context", "answers"))
    whole, parts = "\uac00", "\u1100\u1161"  # one letter, as macOS and others write it
    rows, _ = _prepare(steps, [{"context": f"{parts}.", "answers": forms[form](parts)}])
    assert rows == [{"context": f"{whole}.", "answers": forms[form](whole)}]


def test_rows_to_predict_keep_place_and_id_whatever_a_function_returns(load: Any) -> None:
    steps = replace(STEPS, clean=("own:mark",), keeps_all=True, identity="input")
    rows, counts = _prepare(steps, _inputs("a", "drop", "c"), load)
    assert rows == _inputs("a", "drop", "c")
    assert counts[0].kept == Rows(num=1, first=(2,))


def test_a_function_changes_and_drops_rows_to_train_on(load: Any) -> None:
    rows, counts = _prepare(replace(STEPS, clean=("own:mark",)), _inputs("a", "drop", "c"), load)
    assert rows == _inputs("a!", "c!")
    assert (counts[0].changed.first, counts[0].dropped.first) == ((1, 3), (2,))


FAILING = {
    "own:raises": r"failed at row 2 of split 'train': ZeroDivisionError: division by zero \(.*own_steps.*\.py:6\)$",
    "own:text": "returned at row 1 of split 'train' a value of type str ('aa'); it returns the row (a dict), or None",
    "own:deep": "returned at row 1 of split 'train' a value of type set in column 'input'",
}


@pytest.mark.parametrize("name", FAILING)
def test_a_function_that_fails_is_named_with_the_row(load: Any, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        _prepare(replace(STEPS, clean=(name,)), _inputs("aa", "four"), load)
    said = str(caught.value)
    assert said.startswith("data.clean: own_steps_of_a_test:") and "\n" not in said
    if name == "own:raises":
        caught.match(FAILING[name])
    else:
        assert FAILING[name] in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own:mrak", "has no function 'mrak' (did you mean 'mark'?)"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(load: Any, name: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        _prepare(replace(STEPS, clean=(name,)), _inputs("a"), load)
    assert said in str(caught.value)


def test_the_file_of_a_function_is_found_without_importing_it(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    for name in ("__init__", "steps"):
        (tmp_path / "pack" / f"{name}.py").write_text("raise SystemExit('imported')")
    for name in ("pack.steps:fix", "pack.steps.fix"):
        assert find_source(name, [str(tmp_path)]) == tmp_path / "pack" / "steps.py"
    assert find_source("pack.none:fix", [str(tmp_path)]) is None


def test_rows_are_made_beside_the_others_by_the_seed(load: Any) -> None:
    steps = replace(STEPS, augment=Augment(name="own:pairs", copies=2))
    rows, counts = _prepare(steps, _inputs("a", "b"), load)
    assert [row["input"] for row in rows[::5]] == ["a", "b"] and len(rows) == 10 and counts[0].added == 8
    assert len({row["input"] for row in rows}) == 10
    assert _prepare(steps, _inputs("a", "b"), load)[0] == rows
    assert _prepare(replace(steps, augment=Augment(name="own:pairs", seed=1)), _inputs("a"), load)[0][1] != rows[1]


def test_the_demo_rules_make_inputs_of_the_targets() -> None:
    row = {"id": "1", "input": "as it was", "target": "침대가 정말 편했어요."}
    rows, _ = _prepare(replace(STEPS, augment=Augment(name="hangul", copies=4)), [row])
    assert rows[0] == row and len({made["input"] for made in rows}) == 5
    assert all(made["target"] == row["target"] and len(made["input"]) == len(row["target"]) for made in rows[1:])
    assert hangul.MAIN_MIX.liaison > 0


def test_each_query_finds_its_best_rows_and_their_order_stays() -> None:
    texts = ["방이 좁았다", "조식이 훌륭했다", "방이 방답게 넓은 방", "Great kitchens", "kitchen, KITCHEN!", "바다"]
    select = Select(bm25=Bm25(queries=("조식", "방", "kitchen"), k=1))
    rows, counts = _prepare(replace(STEPS, select=select), _inputs(*texts))
    assert [row["input"] for row in rows] == [texts[1], texts[2], texts[4]]
    assert counts[0].dropped == Rows(num=3, first=(1, 4, 6))
    with pytest.raises(UsageError, match="no row has a word of the query '호텔'"):
        _prepare(replace(STEPS, select=Select(bm25=Bm25(queries=("호텔",)))), _inputs(*texts))
    with pytest.raises(UsageError, match="no row has a word in column 'titel'; name the one to search with"):
        _prepare(replace(STEPS, select=select, search_column="titel"), _inputs(*texts))


def test_a_function_and_a_sample_select_and_copies_are_made_of_what_remains(load: Any) -> None:
    select = Select(function="own:short", sample=2, seed=3)
    rows, counts = _prepare(
        replace(STEPS, select=select, augment=Augment(name="own:pairs")), _inputs(*"abcd", "long"), load
    )
    assert [count.name for count in counts] == ["select function", "select sample", "augment own:pairs"]
    assert [count.dropped.num for count in counts] == [1, 2, 0] and len(rows) == 6
    with pytest.raises(UsageError, match="of type str .*; it returns True for a row that stays, else False"):
        _prepare(replace(STEPS, select=Select(function="own:maybe")), _inputs("a"), load)


def test_each_use_gets_its_steps() -> None:
    data = Data(clean=("html", "drop_empty"), select=Select(sample=3), augment=Augment(name="hangul"))
    settings = StageSettings(data=replace(data, columns=Columns(id="id", target="answer")))
    by_use = {use: steps_of(settings, use) for use in ("train", "eval", "predict", "score")}  # type: ignore[arg-type]
    assert {use: (s.clean, bool(s.select), bool(s.augment), s.keeps_all) for use, s in by_use.items() if s} == {
        "train": (("html", "drop_empty"), True, True, False),
        "eval": (("html", "drop_empty"), False, False, False),
        "predict": (("html",), False, False, True),
        "score": (("html",), False, False, True),
    }
    assert by_use["predict"] == by_use["score"]
    assert by_use["predict"] is not None and by_use["predict"].columns == ("answer", "input")
    assert steps_of(StageSettings(data=Data(clean=("drop_empty",))), "predict") is None


def test_faults_of_the_steps_are_found_before_any_file_is_read() -> None:
    data = Data(
        clean=("htm",), select=Select(function="mine", bm25=Bm25(queries=("?!",))), augment=Augment(name="hangull")
    )
    assert [fault.key for fault in step_faults(StageSettings(data=data))] == [
        *("data.clean.0", "data.select.function", "data.select.bm25.queries", "data.augment.name")
    ]


@pytest.mark.parametrize(
    ("task", "prompt", "without"),
    [
        ("causal_lm", "", "plain text"),
        ("causal_lm", "messages", "a conversation"),
        ("classification", "{input}", "task classification"),
        ("question_answering", "{input}", "task question_answering"),
    ],
)
def test_a_target_that_is_no_text_is_not_obfuscated_into_an_input(task: str, prompt: str, without: str) -> None:
    settings = StageSettings(task=task, data=Data(prompt=prompt, augment=Augment(name="hangul")))
    (fault,) = step_faults(settings)
    assert fault.key == "data.augment.name" and fault.problem.endswith(f"and {without} has no such text")
    assert not list(step_faults(replace(settings, task="seq2seq", data=replace(settings.data, prompt="{input}"))))
