from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import UsageError
from sousbatch.recipes.data.rows import read_rows

QUESTION = {"id": "q1", "question": "누구?", "answers": [{"text": "나", "answer_start": 0}]}
ROW = {
    "id": "q1",
    "question": "누구?",
    "context": "나다",
    "answers": {"text": ["나"], "answer_start": [0]},
    "title": "t",
}


def document(*questions: Any, **changes: Any) -> dict[str, Any]:
    return {
        "version": "1",
        "data": [{"title": "t", "paragraphs": [{"context": "나다", "qas": list(questions)} | changes]}],
    }


def rows_of(folder: Path, text: str) -> list[Any]:
    (folder / "a.json").write_text(text, encoding="utf-8")
    return list(read_rows(folder / "a.json"))


@pytest.mark.parametrize("indent", [None, 2])
def test_each_question_is_a_row(tmp_path: Path, indent: int | None) -> None:
    second = {"id": 2, "question": "무엇?", "answers": [{"text": "다", "answer_start": 1}], "is_impossible": True}
    hidden = {"id": "q3", "question": "언제?"}
    text = json.dumps(document(QUESTION, second, hidden), ensure_ascii=False, indent=indent)
    none = {"text": [], "answer_start": []}
    common = {"context": "나다", "title": "t"}
    assert rows_of(tmp_path, text) == [
        ROW,
        {"id": "2", "question": "무엇?", "answers": none} | common,
        {"id": "q3", "question": "언제?"} | common,  # its answers are not given, which is not the same as none
    ]
    assert rows_of(tmp_path, "\ufeff" + text)[0] == ROW


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            document(QUESTION, QUESTION),
            r"data\[0\].paragraphs\[0\].qas\[0\] and data\[0\].paragraphs\[0\].qas\[1\] have one id, 'q1'",
        ),
        (document(QUESTION, context=None), r"data\[0\].paragraphs\[0\].context is no text but 'None'"),
        (document({"id": "q1"}), r"data\[0\].paragraphs\[0\].qas\[0\] has no 'question', only id; the form is"),
        (document(QUESTION | {"answers": {"text": "나"}}), r"qas\[0\].answers is no list but"),
        (document(QUESTION | {"answers": ["나"]}), r"qas\[0\].answers\[0\] is no object but '나'"),
        ({"data": [*document(QUESTION)["data"], {"title": "t"}]}, r"data\[1\] has no 'paragraphs', only title"),
    ],
)
def test_a_fault_is_named_by_its_place(tmp_path: Path, changed: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows_of(tmp_path, json.dumps(changed, ensure_ascii=False))
