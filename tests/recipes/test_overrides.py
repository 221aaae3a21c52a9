"""Overrides take every sign that means nothing in Hydra's grammar, without quotes."""

from __future__ import annotations

from typing import Any

import pytest

from sousbatch.errors import Fault
from sousbatch.recipes.overrides import axes, parse

READ: dict[str, tuple[str, Any]] = {
    "data.columns.input=대화": ("data.columns.input", "대화"),
    "data.system=한국어 요약 (짧게)!": ("data.system", "한국어 요약 (짧게)!"),
    "+data.splits.검증=파일.csv": ("data.splits.검증", "파일.csv"),
    "data.splits={검증: 가.csv, train: [a.csv, b.csv]}": (
        "data.splits",
        {"검증": "가.csv", "train": ["a.csv", "b.csv"]},
    ),
    "data.clean=[가, '나, 다', 日本語]": ("data.clean", ["가", "나, 다", "日本語"]),
    "data.system='그는 \\'네\\'라고'": ("data.system", "그는 '네'라고"),
    "data.system=don't stop; 😀 <b> & #1": ("data.system", "don't stop; 😀 <b> & #1"),
    "data.system=첫 줄\n둘째 줄": ("data.system", "첫 줄\n둘째 줄"),
    "data.system=${name}의 말": ("data.system", "${name}의 말"),
    "data.splits.train=https://x.org/a?b=c&d=e": ("data.splits.train", "https://x.org/a?b=c&d=e"),
    "seed=int(3)": ("seed", 3),
    "train.peak_lr=1e-4": ("train.peak_lr", 1e-4),
    "train.eval_split=null": ("train.eval_split", None),
    "data.splits.train=~/2박3일.csv": ("data.splits.train", "~/2박3일.csv"),
}


@pytest.mark.parametrize("text", READ)
def test_a_value_needs_no_quotes_for_signs_without_a_meaning(text: str) -> None:
    faults: list[Fault] = []
    assert [(one.key, one.value) for one in parse([text], faults)] == [READ[text]] and faults == []


def test_an_axis_of_a_sweep_keeps_its_texts() -> None:
    faults: list[Fault] = []
    assert axes(["data.system=가,'나, 다',라!", "seed=range(1, 3)", "+data.splits.검증=a.csv,b.csv"], faults) == [
        ["data.system=가", "data.system='나, 다'", "data.system=라!"],
        ["seed=1", "seed=2"],
        ["+data.splits.검증=a.csv", "+data.splits.검증=b.csv"],
    ]
    assert faults == []
    assert axes(["adapter=glob(*)"], faults) == [] and "name the values" in str(faults[0])


WRONG = {
    "no value": ("seed", "write key=value"),
    "no key": ("한국어 요약=3", "is a key, such as data.prompt, and not '한국어 요약'"),
    "several": ("data.system=안녕, 친구", "in quotes: 'data.system=\"안녕, 친구\"'"),
    "braces": ("data.prompt={input} =>", "quotes: 'data.prompt=\"{input} =>\"'"),
    "open list": ("data.clean=[가", "'[' begins a list and nothing ends it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_says_what_to_write_and_not_how_it_was_parsed(name: str) -> None:
    text, hint = WRONG[name]
    faults: list[Fault] = []
    assert parse([text], faults) == [] and hint in str(faults[0])
    assert not [word for word in ("token", "mismatched", "extraneous", "expecting") if word in str(faults[0])]
