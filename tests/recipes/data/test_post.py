"""The steps of `predict.post` over texts, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.errors import RunError, UsageError
from sousbatch.recipes.data.post import POST_STEPS, Post, change_of, problem_of, read_rules

OWN = """
def shout(text):
    return text.upper()

def name(text, row):
    return text.replace("NAME", row["who"])

def number(text):
    return len(text)

def half(text):
    return "\\ud800"

def breaks(text):
    return 1 / (len(text) - 3)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_post_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_post_of_a_test"


@pytest.mark.parametrize("name", POST_STEPS)
def test_a_step_turns_its_example_into_what_is_said(name: str) -> None:
    before, after = POST_STEPS[name].example
    assert before != after
    assert Post([name], "test")(before, 1, {}) == after == Post([name, name], "test")(before, 1, {})


def test_steps_work_in_their_order_and_cut_characters() -> None:
    assert Post(["cut_chars:4", "strip"], "test")(" 가나다라", 1, {}) == "가나다"
    assert Post(["strip", "cut_chars:4"], "test")(" 가나다라", 1, {}) == "가나다라"
    assert Post(["first_line"], "test")("a\u2028b\r\nc", 1, {}) == "a\u2028b", "only newlines end a line"


def test_rules_of_a_file_are_applied_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rules.tsv"
    path.write_text("\ufeff# spelling\n\n(\\w+)씨\t\\1 씨\r\n되요\t돼요\n\\s+$\t\n", encoding="utf-8")
    assert Post([f"replace:{path}"], "test")("영희씨 그러면 되요  ", 1, {}) == "영희 씨 그러면 돼요"
    assert Post(["replace:short"], "test", lambda name: path)("되요", 1, {}) == "돼요", "where the caller says it lies"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no tab", "not a pattern, one tab"),
        ("a\tb\tc", "not a pattern, one tab"),
        ("(\tb", "missing \\), unterminated"),
        ("(a)\t\\2", "invalid group reference 2"),
        ("a\t\\g<b>", "unknown group name"),
    ],
)
def test_a_line_that_is_no_rule_is_named(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "rules.tsv").write_text(f"a\tb\n{line}\n")
    with pytest.raises(UsageError, match=f"predict.post replace:mine, line 2 is no rule: .*{reason}"):
        read_rules(tmp_path / "rules.tsv", "mine")


def test_a_file_of_rules_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_bytes(b"\xff\xfe")
    for name in ("rules.tsv", "gone.tsv"):
        with pytest.raises(UsageError, match="replace:mine cannot be read"):
            read_rules(tmp_path / name, "mine")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stripp", "did you mean 'strip'"),
        ("nothing", "known: strip, first_line"),
        ("cut_chars:0", "such as cut_chars:60"),
        ("cut_chars:", "has no number"),
        ("replace:", "is no step"),
    ],
)
def test_what_is_no_step_is_refused(name: str, said: str) -> None:
    assert said in " ".join(problem_of(name))
    with pytest.raises(UsageError, match="predict.post"):
        Post([name], "test")


def test_own_functions_see_the_text_or_the_text_and_its_row(own: str) -> None:
    assert Post([f"{own}:shout", "strip"], "test")(" ab", 1, {}) == "AB"
    post = Post([f"{own}.name"], "test")
    assert post.needs_rows and post("NAME!", 1, {"who": "영희"}) == "영희!"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("breaks", r"failed at row 7 of split 'test': ZeroDivisionError: division by zero \(.*own_post.*:15\)"),
        ("number", "returned at row 7 .* a value of type int .*; it returns the repaired text"),
        ("none", "has no function 'none'"),
    ],
)
def test_an_own_function_that_fails_is_named_with_its_row(own: str, function: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Post([f"{own}:{function}"], "test")("abc", 7, {})


def _line(**values: object) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


@pytest.fixture
def change(own: str) -> Callable[..., bytes]:
    rows = [{"who": name} for name in ("영희", "철수", "민수")]

    def changed(name: str, *lines: tuple[int, bytes]) -> bytes:
        made = change_of([name.replace("own", own)], "test", {}, Path, iter(rows))
        return b"".join(made.line(line, position) for position, line in lines)

    return changed


def test_a_row_keeps_the_text_before_beside_the_text_after(change: Callable[..., bytes]) -> None:
    line = _line(index=0, id="x", prediction=" a\u2028 ", score=float("nan"))
    after = '{"index": 0, "id": "x", "prediction": "a", "raw_prediction": " a\u2028 ", "score": NaN}\n'
    assert change("strip", (0, line)) == after.encode()
    assert b'"prediction": null, "raw_prediction": null' in change("strip", (0, _line(index=0, prediction=None)))


def test_the_row_of_a_text_is_found_where_units_before_it_are_missing(change: Callable[..., bytes]) -> None:
    lines = [(at, _line(index=at, prediction="NAME")) for at in (0, 2)]
    assert [json.loads(line)["prediction"] for line in change("own:name", *lines).splitlines()] == ["영희", "민수"]


def test_a_text_that_is_no_unicode_is_refused_with_its_row(change: Callable[..., bytes]) -> None:
    with pytest.raises(RunError, match="row 2 cannot be written"):
        change("own:half", (2, _line(index=2, prediction="a")))


def test_the_key_of_a_change_covers_steps_and_files() -> None:
    keys = {
        change_of(names, "test", digests, Path, iter(())).key
        for names, digests in ((["strip"], {}), (["blanks"], {}), (["strip"], {"rules": "1"}), (["strip"], {}))
    }
    assert len(keys) == 3
